"""Who calls: the value that admission, cache keys, traces and the audit log use."""

from __future__ import annotations

from dataclasses import dataclass

from services.runtime.errors import PermissionDeniedError, UnauthenticatedError
from services.runtime.rpc.roles import Role


@dataclass(frozen=True, slots=True)
class Identity:
    """The holder of an API key, a client certificate or a token. `id`: its name in the audit log, after `kind`.

    `tenant`: "" for none. `models`: those it is limited to; empty: all. `expires`: in seconds since the Unix epoch.
    """

    id: str
    tenant: str
    roles: frozenset[Role]
    models: frozenset[str]
    expires: float
    kind: str = "key"

    def __str__(self) -> str:
        return f"{self.kind} {self.id}"

    def has(self, role: Role) -> bool:
        """Whether it may do what needs `role`."""
        return role in self.roles or Role.ADMIN in self.roles

    def check_role(self, role: Role) -> None:
        """Raises PermissionDeniedError unless it may do what needs `role`."""
        if not self.has(role):
            raise PermissionDeniedError(f"this needs the role {role}, which {self.kind} {self.id!r} does not have")

    def check_tenant(self, tenant: str) -> None:
        """Raises PermissionDeniedError unless it is for the tenant."""
        if tenant != self.tenant:
            raise PermissionDeniedError(f"{self.kind} {self.id!r} is for tenant {self.tenant!r}, not {tenant!r}")

    def check_model(self, model: str) -> None:
        """Raises PermissionDeniedError unless it may use the model."""
        if self.models and model not in self.models:
            raise PermissionDeniedError(
                f"{self.kind} {self.id!r} is for {', '.join(sorted(self.models))}, not {model!r}"
            )


def bearer(authorization: str, what: str) -> str:
    """Returns what follows the scheme Bearer in the metadata `authorization`. Raises UnauthenticatedError."""
    scheme, _, value = authorization.partition(" ")
    if scheme.lower() != "bearer":
        raise UnauthenticatedError(f"this needs {what} in the metadata `authorization`, after `Bearer `")
    return value
