"""The model runs of a fleet: their duration, the workers they kill, and whether equal work overlaps."""

from tests.simulation.clock import clock
from tests.simulation.loop import NOBODY

ID, SECONDS, POISON = 0, 1, 2


class Runs:
    """All runs of a simulation."""

    def __init__(self, world):
        self._world = world
        self._under_way = {}
        self.count = 0
        # When each request, by model and id, began to run.
        self.began = {}
        # Number of processes killed by each poison request, by id.
        self.killed = {}

    def seconds(self, rows):
        """Returns the duration of a run of `rows`."""
        return 0.000_1 + 0.000_02 * len(rows) + float(rows[:, SECONDS].max(initial=0))

    def ran(self, model, rows, process):
        """Records a run that begins now in `process`."""
        self.count += 1
        world = self._world
        world.trace("run", process.name, model.name, len(rows), float(rows[0, ID]) if len(rows) else 0)
        ends = clock.ns() + int(self.seconds(rows) * 1e9)
        poison = [row for row in rows if row[POISON]]
        if poison:
            for row in poison:
                self.killed[float(row[ID])] = self.killed.get(float(row[ID]), 0) + 1
            worker = next(worker for worker in world.workers if worker.process is process)
            world.loop.call_at_ns(ends, self._kill, worker, process, context=NOBODY)
        for row in rows:
            key = (model.digest, row.tobytes())
            self.began.setdefault((model.name, float(row[ID])), []).append(clock.ns())
            until, by = self._under_way.get(key, (0, ""))
            if until > clock.ns():
                world.overlapped(model, row, by, process.name)
            self._under_way[key] = (ends, process.name)

    def _kill(self, worker, process):
        if worker.process is process:
            worker.kill("poison")
