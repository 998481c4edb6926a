"""The tokenizer of a package, in this process."""

from node.models.store import Package
from node.models.tokenizer_worker import Tokenizer, read_tokenizer


def load_tokenizer(package: Package) -> Tokenizer:
    """Return the tokenizer of a package, which must have its tokenizer files."""
    names = [file.name for file in package.manifest.tokenizer_files]
    return read_tokenizer(package.path, names, package.manifest.eos_token_ids)
