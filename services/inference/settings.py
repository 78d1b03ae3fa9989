"""Settings of the inference worker."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import ClassVar

from pydantic import Field, field_validator

from services.inference.repository.remote_repository import SCHEMES, RemoteRepository
from services.inference.repository.repository import Directory, ModelSource
from services.inference.repository.signatures import Signatures, SigningKeyError
from services.runtime.process.settings import ServiceSettings, is_host_port
from services.runtime.redis.discovery import AnyRedis, connect
from services.runtime.rpc.server import StartError


class WorkerSettings(ServiceSettings):
    """The settings of a worker."""

    section: ClassVar[str] = "worker"
    address: str = Field("127.0.0.1:8100", description="host:port to serve gRPC on; port 0 takes a free one")
    metrics_address: str = Field("127.0.0.1:8200", description="host:port to serve /metrics on")
    max_unread_bytes: int = Field(
        1 << 30, gt=0, description="answers that routers have not read, beyond which slow ones are cut"
    )
    worker_id: str = Field(f"worker-{os.getpid()}", min_length=1, description="name in traces, metadata and the ring")
    models: str = Field(
        "models", description="model repository in Triton's layout: a folder, or an s3://, gs:// or https:// URL"
    )
    model_keys: Path | None = Field(
        None, description="file of Ed25519 public keys; with it, only models that one of them signed are loaded"
    )
    state_dir: Path = Field(Path(".ringmesh/worker"), description="folder for state that survives restarts")
    model_memory_bytes: int = Field(
        0, ge=0, description="models in memory at once; the least recently used make room for others; 0: all"
    )
    decisions_bytes: int = Field(
        1 << 30, gt=0, description="disk for the models of load requests, which survive restarts"
    )
    threads: int = Field(
        0, ge=0, description="ONNX Runtime threads of a model, which its instances share; 0: the cores it may use"
    )
    poll_seconds: float = Field(0.0, ge=0, description="how often to look for changed models; 0: only when asked to")
    socket_dir: str = Field(
        tempfile.gettempdir(),
        description="folder for a Unix socket, on which routers of this host reach it; empty: none",
    )
    shared_memory_prefix: str = Field(
        "", pattern="^[^/]*$", description="how the names of callers' shared memory objects begin"
    )
    max_batch_rows: int = Field(64, ge=1, description="largest batch formed from several requests")
    triton_metrics: bool = Field(False, description="whether /metrics also has Triton's names, nv_inference_*")
    region: str = Field("", description="region of this worker; routers prefer workers of their own")
    zone: str = Field("", description="part of the region; routers prefer their own for uncached requests")
    discovery_url: str | None = Field(
        None, description="Redis in which the worker announces itself to routers; none: no announcement"
    )
    advertise: str | None = Field(None, description="host:port at which routers reach the worker, if not `address`")
    weight: float = Field(1.0, gt=0, description="share of keys and load relative to other workers")

    @field_validator("advertise")
    @classmethod
    def _is_address(cls, advertise: str | None) -> str | None:
        if advertise is not None and not is_host_port(advertise):
            raise ValueError("not host:port")
        return advertise

    @field_validator("models")
    @classmethod
    def _known_scheme(cls, models: str) -> str:
        scheme, separator, _ = models.partition("://")
        if separator and scheme not in SCHEMES:
            raise ValueError(f"a model repository is a folder, or a URL of {', '.join(SCHEMES)}")
        return models

    def model_source(self) -> ModelSource:
        if "://" in self.models:
            return RemoteRepository(self.models, self.state_dir / "models")
        return Directory(Path(self.models))

    def signatures(self) -> Signatures | None:
        """Checks the signatures of models, if `model_keys` is set. Raises StartError if they cannot be used."""
        try:
            return None if self.model_keys is None else Signatures(self.model_keys)
        except SigningKeyError as error:
            raise StartError(f"RINGMESH_MODEL_KEYS: {error}") from None

    def create_discovery(self) -> AnyRedis | None:
        """The Redis to announce this worker in, if any. Raises StartError if its URL is invalid or `address` is a
        wildcard without `advertise`."""
        if self.discovery_url is None:
            return None
        if self.advertise is None and self.address.rpartition(":")[0] in ("0.0.0.0", "[::]", "*"):  # noqa: S104
            raise StartError(
                f"RINGMESH_ADVERTISE: routers cannot reach {self.address}; say the host:port that they can"
            )
        return connect(self.discovery_url)

    def advertised(self, port: int) -> str:
        return self.advertise or f"{self.address.rpartition(':')[0]}:{port}"
