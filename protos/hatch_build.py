"""Generates the `ringmesh` package from the .proto files while the wheel is built."""

import importlib.resources
import re
import shutil
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
        generate(Path(self.root), Path(self._out.name))
        build_data["force_include"][f"{self._out.name}/ringmesh"] = "ringmesh"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        self._out.cleanup()


def generate(protos: Path, out: Path) -> None:
    from grpc_tools import protoc

    files = sorted(protos.glob("ringmesh/**/*.proto"))
    well_known = importlib.resources.files("grpc_tools") / "_proto"
    kinds = ("python", "grpc_python", "mypy", "mypy_grpc")
    command = ["protoc", f"-I{protos}", f"-I{well_known}", *(f"--{kind}_out={out}" for kind in kinds)]
    if protoc.main([*command, *map(str, files)]):
        raise RuntimeError("protoc failed; its message stands above")
    for module in out.glob("ringmesh/**/*_pb2.py"):
        _use_private_pool(module)
    for folder in {parent for file in out.glob("ringmesh/**/*.py") for parent in file.parents}:
        if out in folder.parents:
            (folder / "__init__.py").touch()
    package = out / "ringmesh"
    (package / "__init__.py").write_text(_INIT)
    (package / "__init__.pyi").write_text(_INIT_PYI)
    shutil.copy(protos / "channel.py", package)
    (package / "py.typed").touch()


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
