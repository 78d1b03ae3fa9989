"""Creates API keys."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

from pydantic import ValidationError

from services.cli.errors import CommandError
from services.runtime.rpc.api_keys import KeyFileError, field_and_fault, ids, new_key
from services.runtime.rpc.roles import Role


def create(file: Path, id: str, tenant: str, roles: list[str], models: list[str], days: float | None) -> str:
    """Appends a key to `file`, and returns it. The file has its hash only. Raises CommandError."""
    try:
        taken = file.exists() and id in ids(file)
    except KeyFileError as error:
        raise CommandError(str(error)) from None
    if taken:
        raise CommandError(f"{file} has a key {id!r}; choose another id, such as {id}-2, or remove its line first")
    expires = datetime.now(UTC) + timedelta(days=days) if days is not None else None
    try:
        key, entry = new_key(id, tenant, [Role(role) for role in roles], models, expires)
        with file.open("a") as lines:
            lines.write(entry.model_dump_json(exclude_defaults=True) + "\n")
    except ValidationError as error:
        faults = (": ".join(filter(None, field_and_fault(fault))) for fault in error.errors())
        raise CommandError("; ".join(faults)) from None
    except ValueError:
        raise CommandError(f"a role is one of {', '.join(Role)}") from None
    except OSError as error:
        raise CommandError(f"cannot write {file}: {error.strerror}") from None
    return key
