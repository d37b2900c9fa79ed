"""Encryption of small secrets at rest and in events, with keys derived from a secret of the environment."""

import base64

from cryptography.fernet import Fernet
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF


def cipher(secret: str, use: str) -> Fernet:
    """The cipher of one `use`; what one seals another cannot open. Opening raises `fernet.InvalidToken`."""
    derived = HKDF(SHA256(), 32, salt=None, info=f"tenfold {use}".encode()).derive(secret.encode())
    return Fernet(base64.urlsafe_b64encode(derived))


def link_cipher(secret: str) -> Fernet:
    """For the tokens of links that go out by email: users seals them, notifier opens them."""
    return cipher(secret, "links")
