"""Settings of the inference worker."""

from __future__ import annotations

import os
from pathlib import Path
from typing import ClassVar

from pydantic import Field

from services.runtime.settings import ServiceSettings


class WorkerSettings(ServiceSettings):
    """What a worker can be told."""

    section: ClassVar[str] = "worker"
    address: str = Field("127.0.0.1:8100", description="host:port to serve gRPC on; port 0 takes a free one")
    metrics_address: str = Field("127.0.0.1:8200", description="host:port to serve /metrics on")
    worker_id: str = Field(f"worker-{os.getpid()}", min_length=1, description="name in traces, metadata and the ring")
    models: Path = Field(Path("models"), description="model repository in Triton's layout")
    threads: int = Field(
        0, ge=0, description="ONNX Runtime threads within one run; 0: the cores of this process or its container"
    )
    poll_seconds: float = Field(0.0, ge=0, description="how often to look for changed models; 0: only when asked to")
    max_batch_rows: int = Field(64, ge=1, description="largest batch formed from several requests")
