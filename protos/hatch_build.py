"""Generates the `ringmesh` package from the .proto files while the wheel is built, by buf and ../buf.gen.yaml."""

import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

_INIT = '''"""gRPC stubs of Ringmesh, generated from protos/; do not edit."""

from google.protobuf.descriptor_pool import DescriptorPool

from ringmesh.channel import SERVICE_CONFIG, channel_options

__all__ = ["POOL", "SERVICE_CONFIG", "channel_options"]

# Not the default pool: tritonclient describes the same `inference.*` names there.
POOL = DescriptorPool()
'''
# protoc's output, and what it becomes.
_PRIVATE_POOL = {
    "from google.protobuf import descriptor_pool as _descriptor_pool\n": "from ringmesh import POOL as _POOL\n",
    "_descriptor_pool.Default()": "_POOL",
}


class GenerateStubs(BuildHookInterface[Any]):
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        self._out = tempfile.TemporaryDirectory(prefix="ringmesh-stubs-")
        package = generate(Path(self.root), Path(self._out.name))
        build_data["force_include"][str(package)] = "ringmesh"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        self._out.cleanup()


def generate(project: Path, out: Path) -> Path:
    """Writes the package below `out` and returns its folder."""
    # A checkout has buf.gen.yaml one folder up; a source distribution, see pyproject.toml, in its root.
    root = project if (project / "buf.gen.yaml").exists() else project.parent
    subprocess.run(["buf", "generate", "--output", out], cwd=root, check=True)
    package = out / "build" / "stubs" / "ringmesh"
    for module in package.rglob("*_pb2.py"):
        _use_private_pool(module)
    for folder in [path for path in package.rglob("*") if path.is_dir()]:
        (folder / "__init__.py").touch()
    (package / "__init__.py").write_text(_INIT)
    shutil.copy(project / "channel.py", package)
    (package / "py.typed").touch()
    return package


def _use_private_pool(module: Path) -> None:
    source = module.read_text()
    for default, private in _PRIVATE_POOL.items():
        if default not in source:
            raise RuntimeError(f"{module}: protoc no longer writes {default!r}, so the descriptor pool is not private")
        source = source.replace(default, private)
    module.write_text(source)
