"""Signatures of model versions: Ed25519 over name, version, files, labels and configuration.

`<model>/<version>.sig`, beside the version's folder, has a signature in base64. Keys are PEM, as `openssl genpkey
-algorithm ed25519` and `openssl pkey -pubout` write them.
"""

from __future__ import annotations

from base64 import b64decode, b64encode
from pathlib import Path

from services.inference.repository.repository import ModelFiles

_STATEMENT = b"ringmesh model version 1\n"
_END = b"-----END PUBLIC KEY-----"


class SigningKeyError(Exception):
    """Keys cannot be used; the message says why."""


class UnsignedError(Exception):
    """A version has no valid signature; the message says why."""


class Signatures:
    """Checks versions against the public keys in a file, of which there may be several, one after the other."""

    def __init__(self, file: Path) -> None:
        """Raises SigningKeyError."""
        try:
            from cryptography.exceptions import InvalidSignature
            from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
            from cryptography.hazmat.primitives.serialization import load_pem_public_key

            self._invalid = InvalidSignature
            texts = [text + _END for text in file.read_bytes().split(_END)[:-1]]
            keys = [load_pem_public_key(text.strip()) for text in texts]
        except ImportError:
            raise SigningKeyError(
                "signatures need the extra `signing` (cryptography), which is not installed"
            ) from None
        except (OSError, ValueError) as error:
            raise SigningKeyError(f"{file} has no public keys in PEM: {error}") from None
        self._keys = [key for key in keys if isinstance(key, Ed25519PublicKey)]
        if not keys or len(self._keys) != len(keys):
            raise SigningKeyError(f"{file}: each key must be an Ed25519 public key in PEM; it has {len(self._keys)}")

    def check(self, files: ModelFiles) -> None:
        """Raises UnsignedError unless one of the keys signed these files, whose content was hashed."""
        file = path_of(files)
        try:
            signature = b64decode(file.read_bytes(), validate=False)
        except (OSError, ValueError):
            raise UnsignedError(
                f"it is not signed: {file} is missing or unreadable; `ringmesh sign` writes it"
            ) from None
        for key in self._keys:
            try:
                key.verify(signature, _statement(files))
            except self._invalid:
                continue
            return
        raise UnsignedError(
            f"{file} is not the signature of its files and configuration by a key in RINGMESH_MODEL_KEYS"
        )


def sign(files: ModelFiles, key: Path) -> Path:
    """Signs a version with the private key in a file. Returns the file of the signature. Raises SigningKeyError."""
    try:
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
        from cryptography.hazmat.primitives.serialization import load_pem_private_key

        private = load_pem_private_key(key.read_bytes(), None)
    except ImportError:
        raise SigningKeyError("signatures need the extra `signing` (cryptography), which is not installed") from None
    except (OSError, ValueError, TypeError) as error:
        raise SigningKeyError(f"{key} has no private key in PEM without a password: {error}") from None
    if not isinstance(private, Ed25519PrivateKey):
        raise SigningKeyError(f"{key} has another key than Ed25519")
    signed = path_of(files)
    signed.write_bytes(b64encode(private.sign(_statement(files.hashed()))) + b"\n")
    return signed


def path_of(files: ModelFiles) -> Path:
    return files.origin.with_name(f"{files.version}.sig")


def _statement(files: ModelFiles) -> bytes:
    return _STATEMENT + files.digest("", size=32)
