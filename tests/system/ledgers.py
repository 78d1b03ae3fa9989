"""A ledger as a process, and a router that appends to it."""

import itertools
import time
from contextlib import suppress

import grpc
import psutil
from blake3 import blake3
from ringmesh.ledger.v1 import ledger_pb2, ledger_pb2_grpc

from router.accounting.usage_batch import Dimension
from tests.system import processes
from tests.usage_records import UsageRecord, encode

_NAMES = itertools.count(time.time_ns())
MINUTE_MS, HOUR_MS, DAY_MS = 60_000, 3_600_000, 86_400_000
WRITTEN = ledger_pb2.AppendResponse.RESULT_WRITTEN
DUPLICATE = ledger_pb2.AppendResponse.RESULT_DUPLICATE
GAP = ledger_pb2.AppendResponse.RESULT_GAP


def unique(name):
    """A name that no other test uses: they share a ledger."""
    return f"{name}-{next(_NAMES)}"


def now_ms():
    return int(time.time() * 1000)


class Ledger:
    """A process and a client of it."""

    def __init__(self, **settings):
        self.settings = settings
        self.started = processes.start("services.ledger", **settings)
        self.channel = grpc.insecure_channel(self.started.address, options=[("grpc.max_reconnect_backoff_ms", 200)])
        self.stub = ledger_pb2_grpc.LedgerServiceStub(self.channel)

    def report(self, *by, from_ms=None, **question):
        groups = [ledger_pb2.Group.Value(f"GROUP_{group.upper()}") for group in by]
        return self.stub.Report(
            ledger_pb2.ReportRequest(by=groups, from_ms=now_ms() - HOUR_MS if from_ms is None else from_ms, **question),
            timeout=60,
        )

    def postgres(self):
        """Its postmaster; None while there is none."""
        for child in self.started.info.children():
            with suppress(psutil.NoSuchProcess):
                if child.name() == "postgres":
                    return child
        return None

    def stop(self):
        self.channel.close()
        processes.stop(self.started)


class Sender:
    """A router as the ledger sees it: its own id and epoch, sequence numbers in order."""

    def __init__(self, ledger, router_id=None, epoch=1):
        self.ledger = ledger
        self.router_id = router_id or unique("router")
        self.epoch = epoch
        self.next = 1

    def append(self, records, sequence=None, batch=None, digest=None, **rest):
        batch = encode(records, **rest) if batch is None else batch
        sequence = self.next if sequence is None else sequence
        answer = self.ledger.stub.Append(
            ledger_pb2.AppendRequest(
                router_id=self.router_id,
                start_epoch=self.epoch,
                sequence=sequence,
                batch=batch,
                digest=blake3(batch).digest(16) if digest is None else digest,
            ),
            timeout=60,
        )
        self.next = answer.last_sequence + 1
        return answer


def miss(tenant, at_ms=None, compute_us=1000, model="mlp", worker_type="cpu", status="OK", region="", **rest):
    return UsageRecord(
        Dimension(tenant, model, "1", region, worker_type, "miss", status),
        now_ms() if at_ms is None else at_ms,
        compute_us=compute_us,
        **rest,
    )


def hits(tenant, requests, at_ms=None, saved_us=0, model="mlp", worker_type="cpu", router_us=0, **rest):
    return UsageRecord(
        Dimension(tenant, model, "1", "", worker_type, "hit-local", "OK"),
        now_ms() if at_ms is None else at_ms,
        requests=requests,
        saved_us=saved_us,
        router_us=router_us,
        **rest,
    )


def worker_time(worker_id, minute, seconds=(1 << 60) - 1, worker_type="cpu", region=""):
    return ledger_pb2.WorkerTime(
        worker_id=worker_id, worker_type=worker_type, region=region, minute=minute, seconds=seconds
    )
