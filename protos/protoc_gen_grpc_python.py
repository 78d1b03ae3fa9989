"""protoc's generator `grpc_python`, which grpcio-tools has only inside its protoc, as a plugin for buf."""

import sys
import tempfile
from pathlib import Path

from google.protobuf.compiler import plugin_pb2
from google.protobuf.descriptor_pb2 import FileDescriptorSet
from grpc_tools import protoc

request = plugin_pb2.CodeGeneratorRequest.FromString(sys.stdin.buffer.read())
response = plugin_pb2.CodeGeneratorResponse(supported_features=plugin_pb2.CodeGeneratorResponse.FEATURE_PROTO3_OPTIONAL)
with tempfile.TemporaryDirectory() as folder:
    descriptors = Path(folder, "descriptors")
    descriptors.write_bytes(FileDescriptorSet(file=request.proto_file).SerializeToString())
    command = ["protoc", f"--descriptor_set_in={descriptors}", f"--grpc_python_out={folder}"]
    if protoc.main([*command, *request.file_to_generate]):
        sys.exit("protoc failed; its message stands above")
    for path in sorted(Path(folder).rglob("*.py")):
        response.file.add(name=str(path.relative_to(folder)), content=path.read_text())
sys.stdout.buffer.write(response.SerializeToString())
