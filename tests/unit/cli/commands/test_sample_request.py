"""Sample requests as commands."""

import pytest
from ringmesh.oip.v2 import grpc_service_pb2 as v2

from services.cli.commands.sample_request import SampleRequest

X = v2.ModelMetadataResponse.TensorMetadata(name="x", datatype="FP32", shape=[-1, 4])


@pytest.mark.parametrize("datatype", ["BF16", "FP16", "FP32", "INT8", "BOOL", "BYTES"])
def test_tritons_client_takes_the_values_of_the_printed_call(datatype):
    tensor = v2.ModelMetadataResponse.TensorMetadata(name="x", datatype=datatype, shape=[-1, 4])
    lines = SampleRequest("m", [tensor], ["y"]).python("127.0.0.1:8001").splitlines()
    made = {}
    exec("\n".join(line for line in lines if line.startswith(("import", "inputs"))), made)
    assert made["inputs"][0].shape() == [1, 4]


def test_where_callers_need_a_key_the_printed_calls_send_it():
    sample = SampleRequest("m", [X], ["y"])
    assert '-H "authorization: Bearer $RINGMESH_API_KEY"' in sample.grpcurl("127.0.0.1:8001", has_keys=True)
    python = sample.python("127.0.0.1:8001", has_keys=True)
    assert "import os\n" in python
    assert "client.infer('m', inputs, headers={'authorization': 'Bearer ' + os.environ['RINGMESH_API_KEY']})" in python
    assert "authorization" not in sample.grpcurl("127.0.0.1:8001") + sample.python("127.0.0.1:8001")
