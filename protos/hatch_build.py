"""Generates the `ringmesh` package from the .proto files while the wheel is built, by buf and ../buf.gen.yaml."""

import re
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
_INIT_PYI = """from google.protobuf.descriptor_pool import DescriptorPool

from ringmesh.channel import SERVICE_CONFIG as SERVICE_CONFIG
from ringmesh.channel import channel_options as channel_options

POOL: DescriptorPool
"""


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
    (package / "__init__.pyi").write_text(_INIT_PYI)
    shutil.copy(project / "channel.py", package)
    (package / "py.typed").touch()
    return package


def _use_private_pool(module: Path) -> None:
    source = module.read_text()
    source, pools = re.subn(r"_descriptor_pool\.Default\(\)", "_POOL", source)
    source, imports = re.subn(
        r"^from google\.protobuf import descriptor_pool as _descriptor_pool$",
        "from ringmesh import POOL as _POOL",
        source,
        flags=re.MULTILINE,
    )
    if not (pools and imports == 1):
        raise RuntimeError(f"{module}: protoc's output changed shape; the private descriptor pool was not set")
    module.write_text(source)
