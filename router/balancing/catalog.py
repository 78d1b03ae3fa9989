"""The models that the fleet serves, merged from the workers' descriptions."""

from __future__ import annotations  # compiled by mypyc

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from ringmesh.inference.v1 import inference_pb2
from ringmesh.oip.v2 import grpc_service_pb2 as v2

from cache.policy.freshness import Freshness, tightest
from router.accounting.meter import CPU, type_of_worker
from services.runtime.errors import UnavailableError
from services.runtime.oip import ensemble
from services.runtime.oip.absent_model import absent, unreachable
from services.runtime.oip.ensemble import Plan
from services.runtime.oip.request_check import Declared
from services.runtime.verdict import YES, Verdict

# A parameter in the config.pbtxt of an ensemble.
CACHE_STEPS = "ringmesh_cache_steps"


@dataclass(frozen=True, slots=True)
class ModelEntry:
    """One version of a model; inference.ModelVersion documents the fields that are not described here.

    - `cacheable`: whether its answers are cached.
    - `inputs`, `outputs`: those of its metadata.
    - `shared_tier`: "always" or "never" if its configuration decides whether Redis is used, else "" (by cost).
    - `freshness`: how long answers are valid; None: forever.
    - `plan`: the steps, for an ensemble; with `cache_steps` the router runs them one by one, each through the cache.
      `step_digests`: of the models that they run.
    - `runnable`: whether a worker may run it.
    - `worker_type`: of the workers that hold it, as the ledger prices them; of several types, the cheaper.
    """

    name: str
    version: str
    digest: bytes
    cacheable: Verdict
    metadata: v2.ModelMetadataResponse
    inputs: Mapping[str, Declared] = field(default_factory=dict)
    outputs: tuple[str, ...] = ()
    tenant_scoped: bool = False
    row_cache: bool = False
    max_request_rows: int = 0
    hedged: bool = False
    semantic_threshold: float = 0.0
    semantic_embedding: str = ""
    shared_tier: str = ""
    freshness: Freshness | None = None
    plan: Plan | None = None
    step_digests: frozenset[bytes] = frozenset()
    cache_steps: bool = False
    provider: str = ""
    limits_queue: bool = False
    runnable: Verdict = YES
    worker_type: str = CPU


class Catalog:
    """An immutable view of all models that at least one worker of `holdings` holds.

    `failed`: versions that workers could not load; used for errors if no worker holds the model. `lost`: versions of
    workers that cannot be reached, likewise. `isolates`: callers have identities, so tenants share the answers of a
    model only if its configuration says so.
    """

    def __init__(
        self,
        holdings: Iterable[Iterable[inference_pb2.ModelVersion]],
        failed: Iterable[inference_pb2.FailedVersion] = (),
        lost: Iterable[inference_pb2.ModelVersion] = (),
        *,
        isolates: bool = False,
    ) -> None:
        self._isolates = isolates
        self._failures: dict[str, dict[str, str]] = {}
        for failure in failed:
            self._failures.setdefault(failure.model, {}).setdefault(failure.version, failure.reason)
        self._lost = {(model.name, version) for model in lost for version in (model.version, "")}
        found: dict[tuple[str, str], inference_pb2.ModelVersion] = {}
        # Ensembles that a worker runs whole.
        whole: set[tuple[str, str]] = set()
        self._has_workers = False
        types: dict[tuple[str, str], str] = {}
        for holding in holdings:
            self._has_workers = True
            models = [*holding]
            of_worker = type_of_worker(model.provider for model in models)
            for model in models:
                key = (model.name, model.version)
                found.setdefault(key, model)
                types[key] = CPU if of_worker == CPU else types.get(key, of_worker)
                if model.HasField("ensemble") and not model.ensemble.not_runnable:
                    whole.add((model.name, model.version))
        # By model, oldest first.
        self.versions: dict[str, list[str]] = {}
        for name, version in sorted(found, key=lambda key: (key[0], int(key[1]))):
            self.versions.setdefault(name, []).append(version)
        self._entries = {
            key: _entry(model, self.versions[model.name], types[key], isolates=isolates) for key, model in found.items()
        }
        for name, versions in self.versions.items():
            self._entries[name, ""] = self._entries[name, versions[-1]]
        # Ensembles come after the models, which are their steps.
        for key, model in found.items():
            if model.HasField("ensemble"):
                entry = self._ensemble(model, self._entries[key], found, is_run=key in whole)
                self._entries[key] = entry
                if key[1] == self.versions[key[0]][-1]:
                    self._entries[key[0], ""] = entry

    @property
    def tenant_scoped(self) -> list[str]:
        return sorted({entry.name for entry in self._entries.values() if entry.tenant_scoped})

    def find(self, name: str, version: str, *, may_read: bool = False) -> ModelEntry:
        """The given version, or the latest if `version` is "". Raises UnavailableError, or the error of `absent`.

        Where callers have identities, that error names another model only if the caller `may_read`.
        """
        entry = self._entries.get((name, version))
        if entry is not None:
            return entry
        if not (self._has_workers or self._failures):
            raise UnavailableError("no worker is connected, so no model can be served; retry later", kind="no_worker")
        if (name, version) in self._lost:
            raise unreachable(name)
        raise absent(name, version, self.versions, self._failures, suggests=may_read or not self._isolates)

    def _ensemble(
        self,
        model: inference_pb2.ModelVersion,
        entry: ModelEntry,
        found: Mapping[tuple[str, str], inference_pb2.ModelVersion],
        *,
        is_run: bool,
    ) -> ModelEntry:
        """The ensemble's entry, with steps from the whole fleet, or marked not runnable with the reason."""
        config = model.ensemble.config
        plan = ensemble.plan(
            config.ensemble_scheduling, (t.name for t in config.input), (t.name for t in config.output)
        )
        parameter = config.parameters.get(CACHE_STEPS)
        cache_steps = parameter is not None and parameter.string_value == "true"
        known = [self._entries.get((step.model, step.version)) for step in plan.steps]
        steps = [step for step in known if step is not None]
        signatures = [_signature(found[step.name, step.version]) for step in steps]
        if len(steps) < len(known):
            lacking = plan.steps[known.index(None)]
            version = f" in version {lacking.version}" if lacking.version else ""
            fits = Verdict(f"no worker holds its step {lacking.model!r}{version}")
        elif is_run and not any(signature.is_ensemble for signature in signatures):
            fits = YES
        else:
            itself = _signature(model)
            fits = ensemble.fits(plan, itself.inputs, itself.outputs, signatures)
        if not fits:  # without a plan, which might contain the ensemble itself
            return replace(entry, cacheable=fits, runnable=fits)
        freshness = entry.freshness
        for each in steps:
            freshness = tightest(freshness, each.freshness)
        return replace(
            entry,
            plan=plan,
            step_digests=frozenset([step.digest for step in steps]),
            cache_steps=cache_steps,
            freshness=freshness,
            tenant_scoped=entry.tenant_scoped or any(step.tenant_scoped for step in steps),
            digest=ensemble.digest(model.ensemble.own_digest, (step.digest for step in steps)),
            cacheable=ensemble.cacheable(config, ((step.name, step.cacheable) for step in steps)),
        )


def _signature(model: inference_pb2.ModelVersion) -> ensemble.Signature:
    inputs = {tensor.name: tensor.datatype for tensor in model.metadata.inputs}
    return ensemble.Signature(
        inputs,
        [name for name in inputs if name not in model.optional_inputs],
        {tensor.name: tensor.datatype for tensor in model.metadata.outputs},
        model.HasField("ensemble"),
    )


def _entry(model: inference_pb2.ModelVersion, versions: list[str], worker_type: str, *, isolates: bool) -> ModelEntry:
    metadata = v2.ModelMetadataResponse()
    metadata.CopyFrom(model.metadata)
    metadata.versions[:] = versions
    return ModelEntry(
        model.name,
        model.version,
        model.digest,
        YES if model.cacheable else Verdict(model.cacheable_reason or "the model is not cacheable"),
        metadata,
        inputs={tensor.name: (tensor.datatype, (*tensor.shape,)) for tensor in metadata.inputs},
        outputs=tuple(output.name for output in metadata.outputs),
        tenant_scoped=model.tenant_scoped or (isolates and not model.tenant_shared),
        row_cache=model.row_cache,
        max_request_rows=model.max_request_rows,
        provider=model.provider,
        worker_type=worker_type,
        hedged=model.hedged,
        limits_queue=model.limits_queue,
        semantic_threshold=model.semantic_threshold,
        semantic_embedding=model.semantic_embedding,
        # The hit ratio of exact matches does not show how many similar requests an entry answers.
        shared_tier=model.shared_tier or ("always" if model.semantic_threshold else ""),
        freshness=Freshness(model.ttl_ms, model.stale_ms) if model.ttl_ms else None,
    )
