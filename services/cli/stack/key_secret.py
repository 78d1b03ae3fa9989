"""The secret that the routers and caches of one installation share."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from services.cli.errors import CommandError

_VARIABLE = "RINGMESH_KEY_SECRET"
_FILE = "key-secret"


def key_secret(state: Path) -> str:
    """Returns RINGMESH_KEY_SECRET if it is set, else the secret in `state`, which is generated once.

    Only the owner of the file can read it. Raises CommandError.
    """
    if secret := os.environ.get(_VARIABLE):
        return secret
    path = state / _FILE
    try:
        state.mkdir(parents=True, exist_ok=True)
        # Write a temporary file and link it, so that the file is complete even if two processes create it at once.
        aside = path.with_name(f"{_FILE}.{os.getpid()}")
        aside.touch(mode=0o600)
        aside.write_text(secrets.token_hex(32) + "\n")
        try:
            os.link(aside, path)
        except FileExistsError:
            pass
        finally:
            aside.unlink()
        secret = path.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise CommandError(f"cannot keep a secret in {path}: {error}; set {_VARIABLE} instead") from None
    if not secret:
        raise CommandError(f"{path} is empty; remove it to have a new secret generated, or set {_VARIABLE}")
    return secret
