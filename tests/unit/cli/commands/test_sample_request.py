"""Sample requests as commands."""

import pytest
from ringmesh.oip.v2 import grpc_service_pb2 as v2

from services.cli.commands.sample_request import SampleRequest


@pytest.mark.parametrize("datatype", ["BF16", "FP16", "FP32", "INT8", "BOOL", "BYTES"])
def test_tritons_client_takes_the_values_of_the_printed_call(datatype):
    tensor = v2.ModelMetadataResponse.TensorMetadata(name="x", datatype=datatype, shape=[-1, 4])
    lines = SampleRequest("m", [tensor], ["y"]).python("127.0.0.1:8001").splitlines()
    made = {}
    exec("\n".join(line for line in lines if line.startswith(("import", "inputs"))), made)
    assert made["inputs"][0].shape() == [1, 4]
