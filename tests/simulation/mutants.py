"""Faults that Ringmesh once had, put back one at a time, to show that the simulation finds them.

Each is an edit of sources as they are imported. An edit that does not find its text fails: then the code has changed,
and the mutant is to be written anew.
"""

import importlib.machinery
import sys

_NO_BORDER = ("    for name, text in (\n", '    return ""\n    for name, text in (\n')

MUTANTS = {
    # A full tier drained its heap, and every put raised: compiled code boxes floats anew, so `is` was never true.
    "eviction": {
        "cache.tiers.local_tier": [
            (
                "entry.worth != worth:\n                continue",
                "entry.worth + 0.0 is not worth:\n                continue",
            ),
            ("<= target or not heap:", "<= target:"),
        ]
    },
    # Whatever shapes were quick before is run on the event loop, also where values decide how long it takes.
    "blocking run": {"services.inference.execution.inline_runs": [("    if unknown:\n", "    if False:\n")]},
    # What waited for a stopped worker was sent to it again.
    "resend": {
        "router.transport.worker_client": [
            (
                '        self._close(LinkClosedError("it stopped answering"))\n',
                "        for envelope, cancel in list(self._envelopes.items()):\n"
                "            cancel()\n"
                '            silent = CallError(grpc.StatusCode.UNAVAILABLE, "it stopped answering")\n'
                "            self._answered(envelope, silent)\n",
            )
        ]
    },
    # An unexpected exception in a flight left it, and all that joined it, without an end.
    "flight": {
        "services.runtime.single_flight": [
            (
                "Driver(work, flight.end)",
                "Driver(work, lambda end: isinstance(end, ArithmeticError) or flight.end(end))",
            )
        ]
    },
    # Requests whose worker said nothing outlasted their deadline.
    "deadline": {"services.runtime.driver": [("        self._throw(DeadlinePassed())", "        pass")]},
    # Work in the background ended at the first thing that it did not expect.
    "background": {
        "services.runtime.telemetry.supervisor": [
            ("if await self._run_once(name, work()) or _is_cancelled():", "await work()\n            if True:")
        ],
        "router.membership.worker_description": [_NO_BORDER],
    },
    # A worker that died while a hedge was under way did not count.
    "hedged poison": {
        "router.dispatch.attempts": [
            (
                "self._ended += isinstance(outcome, WorkerLostError)\n",
                "self._ended += isinstance(outcome, WorkerLostError) and not self._under_way\n",
            )
        ]
    },
    # What had waited too long was only noticed when an instance became free.
    "queue timeout": {
        "services.inference.scheduling.request_queue": [("        if at < self._timer_at:\n", "        if False:\n")]
    },
    # A process that purged took its own purge for word of all that others had purged before it.
    "purges at once": {
        "cache.keys.invalidation": [
            (
                "self._run(_BEAT, self._member, str(self._heard))",
                "self._run(_BEAT, self._member, str(self.epochs.version))",
            )
        ]
    },
}


def apply(name):
    """From now on, modules are imported with this fault."""
    sys.meta_path.insert(0, _Finder(MUTANTS[name]))


class _Finder:
    def __init__(self, edits):
        self._edits = edits

    def find_spec(self, fullname, path, target=None):
        edits = self._edits.get(fullname)
        if edits is None:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path)
        spec.loader = _Loader(fullname, spec.origin)
        spec.loader.edits = edits
        return spec


class _Loader(importlib.machinery.SourceFileLoader):
    edits = ()

    def path_stats(self, path):
        raise OSError("what is compiled from the file as it is must not be used")

    def source_to_code(self, data, path, **_):
        text = bytes(data).decode()
        for old, new in self.edits:
            assert text.count(old) == 1, f"{path} has {old!r} {text.count(old)} times"
            text = text.replace(old, new)
        return compile(text, path, "exec", dont_inherit=True)
