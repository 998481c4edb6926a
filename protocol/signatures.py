"""Ed25519 signatures (RFC 8032), verified by libsodium.

A new peer verifies tens of thousands of them. libsodium takes half the time of OpenSSL, and rejects keys and points of
small order, under which one signature is valid for more than one message.
"""

from nacl.bindings import crypto_sign_open
from nacl.exceptions import CryptoError

from protocol.limits import SIGNATURE_BYTES


def is_valid_signature(message: bytes, signature: bytes, public_key: bytes) -> bool:
    """Return whether a signature (64 bytes) of a message is valid for a public key (32 bytes)."""
    if len(signature) != SIGNATURE_BYTES:
        return False
    try:
        crypto_sign_open(signature + message, public_key)
    except (CryptoError, ValueError):
        return False
    return True
