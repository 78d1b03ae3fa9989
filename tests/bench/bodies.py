"""Files of request bodies for the load generator."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from ringmesh.oip.v2 import grpc_service_pb2 as v2

DATATYPES = {"int32": "INT32", "float32": "FP32", "uint8": "UINT8"}


def write_bodies(path: Path, model: str, name: str, arrays: Iterable[np.ndarray]) -> Path:
    """Writes one request for each array, preceded by its length (uint32, little-endian)."""
    with path.open("wb") as file:
        for array in arrays:
            request = v2.ModelInferRequest(model_name=model, raw_input_contents=[array.tobytes()])
            request.inputs.add(name=name, datatype=DATATYPES[str(array.dtype)], shape=array.shape)
            body = request.SerializeToString()
            file.write(len(body).to_bytes(4, "little") + body)
    return path
