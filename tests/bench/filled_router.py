"""A router that starts with RINGMESH_ENTRIES cached answers of RINGMESH_VALUE_BYTES each; none is ever requested."""

from services.runtime.machine import startup

startup.use_tcmalloc()
startup.begin()

import os  # noqa: E402

from cache.mesh import Mesh  # noqa: E402
from cache.tiers.entry import Entry  # noqa: E402
from router.main import serve  # noqa: E402
from router.settings import RouterSettings  # noqa: E402
from services.runtime.process.process import run  # noqa: E402


class FilledSettings(RouterSettings):
    entries: int = 0
    value_bytes: int = 0

    def create_mesh(self, secret: str) -> Mesh:
        mesh = super().create_mesh(secret)
        for _ in range(self.entries):
            mesh.local.put(os.urandom(32), Entry(os.urandom(self.value_bytes), 1000))
        return mesh


if __name__ == "__main__":
    run(FilledSettings, serve)
