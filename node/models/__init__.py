"""Model packages: manifests, the cache, import, the catalogue, tokenizers, and fetching files from peers."""
