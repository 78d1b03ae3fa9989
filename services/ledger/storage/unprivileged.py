"""The user that PostgreSQL runs as, since it refuses to run as root."""

from __future__ import annotations

import ctypes
import os
import pwd
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

_LIBC = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None
_PR_SET_KEEPCAPS, _PR_CAP_AMBIENT, _PR_CAP_AMBIENT_RAISE = 8, 47, 2
_CAP_DAC_READ_SEARCH = 2
_CAPABILITY_VERSION_3 = 0x20080522


class _Header(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _Sets(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_uint32) for name in ("effective", "permitted", "inheritable"))


@dataclass(frozen=True, slots=True)
class Unprivileged:
    """`nobody`. Files of `paths` stay readable where a folder above them is root's alone, such as /root."""

    uid: int
    gid: int
    may_search: bool

    @classmethod
    def needed(cls, paths: Iterable[Path]) -> Unprivileged | None:
        """None where this process is not root."""
        if os.geteuid() != 0:
            return None
        nobody = pwd.getpwnam("nobody")
        folders = {folder for path in paths for folder in path.absolute().parents}
        hidden = any(not folder.stat().st_mode & 0o001 for folder in folders)
        return cls(nobody.pw_uid, nobody.pw_gid, may_search=hidden)

    def become(self) -> Callable[[], None]:
        """What a child runs between fork and exec."""
        uid, gid, libc = self.uid, self.gid, _LIBC if self.may_search else None
        header = _Header(_CAPABILITY_VERSION_3, 0)
        search = 1 << _CAP_DAC_READ_SEARCH
        sets = (_Sets * 2)(_Sets(search, search, search), _Sets(0, 0, 0))

        def change_user() -> None:
            if libc is not None:
                libc.prctl(_PR_SET_KEEPCAPS, 1, 0, 0, 0)
            os.setgroups([])
            os.setgid(gid)
            os.setuid(uid)
            if libc is not None:
                # The right to pass through folders, not to write there; kept by exec because it is ambient.
                libc.capset(ctypes.byref(header), sets)
                libc.prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_RAISE, _CAP_DAC_READ_SEARCH, 0, 0)

        return change_user
