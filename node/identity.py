"""Who this node is: an Ed25519 key in a file of its own, made on the first start."""

import os
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from protocol.identity import PeerId, peer_id_from_public_key

KEY_FILE = "peer.key"
_SEED_BYTES = 32


class IdentityError(Exception):
    """The key file cannot be used. The message is one line for the user."""


class Identity:
    """The node's private key and the peer id that follows from it."""

    def __init__(self, seed: bytes) -> None:
        self.seed = seed
        self.private_key = Ed25519PrivateKey.from_private_bytes(seed)
        self.peer_id: PeerId = peer_id_from_public_key(self.private_key.public_key().public_bytes_raw())

    def __repr__(self) -> str:
        return f"Identity({self.peer_id})"


def load_or_create(data_dir: Path) -> Identity:
    """Return the identity kept in a data directory (hexadecimal, mode 0600), made now if there is none."""
    path = data_dir / KEY_FILE
    try:
        # O_EXCL and the mode at creation: the key is at no moment readable by others.
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return _load(path)
    except OSError as error:
        raise IdentityError(f"cannot write the key file {path}: {error.strerror}") from None
    seed = os.urandom(_SEED_BYTES)
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(seed.hex() + "\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        path.unlink(missing_ok=True)  # half a key would count as a damaged one at the next start
        raise IdentityError(f"cannot write the key file {path}: {error.strerror}") from None
    return Identity(seed)


def _load(path: Path) -> Identity:
    try:
        mode = path.stat().st_mode & 0o777
        text = path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise IdentityError(f"cannot read the key file {path}: {error}") from None
    if mode & 0o077:
        raise IdentityError(f"the key file {path} is readable by others (mode {mode:o}): chmod 600 it")
    try:
        seed = bytes.fromhex(text)
    except ValueError:
        seed = b""
    if len(seed) != _SEED_BYTES:
        raise IdentityError(f"the key file {path} is damaged: remove it to get a new identity")
    return Identity(seed)
