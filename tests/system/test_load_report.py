"""What callers' load balancers are told in the trailing metadata of every answer."""

import base64
import json
import re
import subprocess

import pytest
from ringmesh.orca.v3 import orca_load_report_pb2

from tests.system.conftest import GRPCURL

pytestmark = pytest.mark.both_engines

X = {"name": "x", "datatype": "FP32", "shape": [1, 64], "contents": {"fp32_contents": [0.5] * 64}}
MODEL_INFER = "inference.GRPCInferenceService/ModelInfer"
REQUEST = json.dumps({"model_name": "mlp", "inputs": [X]})


def report(address):
    """By grpcurl, for gRPC's own clients keep it to themselves."""
    call = [GRPCURL, "-plaintext", "-v", "-H", "cache-control: no-cache", "-d", REQUEST, address, MODEL_INFER]
    told = subprocess.run(call, capture_output=True, text=True, timeout=60, check=True).stdout
    encoded = re.search(r"^endpoint-load-metrics-bin: (\S+)$", told, re.MULTILINE).group(1)
    return orca_load_report_pb2.OrcaLoadReport.FromString(base64.b64decode(encoded + "=="))


@pytest.mark.parametrize("which", ["router", "worker"])
def test_answers_carry_the_load_of_who_answered(stack, which):
    address = stack.router if which == "router" else stack.workers[0]
    # The first call counts in the report after it; in the one before, the errors of an earlier test.
    while not (last := report(address)).rps_fractional or last.eps:
        pass
    assert last.application_utilization > 0
    assert ("estimated_wait_seconds" in last.named_metrics) == (which == "worker")
