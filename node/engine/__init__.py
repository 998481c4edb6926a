"""The shard engine: the only package that imports torch. Tensors in, tensors out, no network."""
