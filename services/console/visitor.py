"""Who asks the console for a page, and what they may see and do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from services.runtime.errors import PermissionDeniedError
from services.runtime.rpc.identity import Identity
from services.runtime.rpc.roles import Role


@dataclass(frozen=True, slots=True)
class Visitor:
    """`who`: as in the audit log. `identity`: None without API keys; then only browsers of an admin network
    (`is_near`) may change something. `authorization`: the metadata of calls in the visitor's name; "": the console's
    own credential. `is_current`: whether this still holds, for pages that stay open."""

    who: str = "browser"
    is_near: bool = False
    identity: Identity | None = None
    authorization: str = ""
    is_current: Callable[[], bool] = lambda: True

    def may(self, role: str) -> bool:
        """Whether the visitor has the role."""
        if self.identity is None:
            return self.is_near or role in (Role.INFER, Role.READ)
        return self.identity.has(Role(role))

    @property
    def limits(self) -> tuple[str, frozenset[str]]:
        """The tenant and the models that the visitor's key is for; "" and none: all."""
        return (self.identity.tenant, self.identity.models) if self.identity is not None else ("", frozenset())

    def sees(self, tenant: str, model: str) -> bool:
        """Whether the visitor may see a request of this tenant for this model."""
        own, models = self.limits
        return own in ("", tenant) and (not models or model in models)

    def opens(self, path: str) -> bool:
        """Whether the visitor may open a page."""
        try:
            self.check("GET", path)
        except PermissionDeniedError:
            return False
        return self is not NOBODY

    def check(self, method: str, path: str) -> None:
        """Raises PermissionDeniedError unless the visitor may send such a request."""
        role = role_of(method, path)
        if role is None:
            return
        if self.identity is None:
            if not self.may(role):
                raise PermissionDeniedError(
                    "this is for browsers on this host; name other networks in RINGMESH_ADMIN_NETWORKS"
                )
            return
        self.identity.check_role(role)
        tenant, models = self.limits
        if not (tenant or models):
            return
        page, _, name = path.removeprefix("/").partition("/")
        if page == "models" and name and not tenant:
            self.identity.check_model(name)
        elif page not in ("traces", "compare", "try"):
            what = f"tenant {tenant!r}" if tenant else ", ".join(sorted(models))
            raise PermissionDeniedError(
                f"this page shows all tenants and models, and {self.identity} is for {what}; Traces and Try it show "
                "what it may see"
            )


# Somebody who has not signed in, or whose request was refused before that was known.
NOBODY = Visitor("unknown", is_current=lambda: False)


def role_of(method: str, path: str) -> Role | None:
    """The role that a request needs; None if anybody may send it."""
    if path in ("/sign-in", "/sign-out") or path.startswith("/static/"):
        return None
    if path == "/audit":
        return Role.ADMIN
    if method in ("GET", "HEAD"):
        return Role.READ
    return Role.INFER if path == "/try" else Role.OPERATE
