import itertools
import mmap
import os
import threading
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from services.runtime.machine import huge_pages
from services.runtime.machine.huge_pages import collapse

PRIVATE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS


def on_huge_pages():
    text = Path("/proc/self/smaps_rollup").read_text()
    return int(text.partition("AnonHugePages:")[2].split()[0]) << 10


@pytest.fixture
def used():
    """32 MB in full use, on small pages."""
    with mmap.mmap(-1, 32 << 20, flags=PRIVATE) as memory:
        memory.madvise(mmap.MADV_NOHUGEPAGE)
        memory.write(os.urandom(32 << 20))
        memory.madvise(mmap.MADV_HUGEPAGE)
        yield memory


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="the kernel has no huge pages")
def test_what_is_in_full_use_comes_to_lie_on_huge_pages_and_stays_as_it_is(used):
    before, content = on_huge_pages(), used[:]
    try:
        collapse(SimpleNamespace(is_set=lambda: False, wait=lambda seconds: None))  # without its pauses
    except OSError:
        pytest.skip("no /proc")
    grown = on_huge_pages() - before
    if grown == 0:
        pytest.skip("the kernel does not collapse on request")
    assert grown >= 16 << 20
    assert used[:] == content


def test_copies_take_a_fiftieth_of_the_time(used, monkeypatch):
    pauses, now = [], itertools.count()
    monkeypatch.setattr(huge_pages, "time", SimpleNamespace(monotonic=lambda: next(now) / 1000))
    try:
        collapse(SimpleNamespace(is_set=lambda: False, wait=pauses.append))
    except OSError:
        pytest.skip("no /proc")
    assert pauses
    assert {round(pause, 6) for pause in pauses} == {0.05}


def test_a_process_that_stops_does_not_wait_for_the_rest(used):
    stopping = threading.Event()
    stopping.set()
    assert collapse(stopping) == 0


def test_what_is_hardly_used_takes_no_more_memory():
    with mmap.mmap(-1, 64 << 20, flags=PRIVATE) as memory:
        for start in range(0, 64 << 20, 1 << 20):
            memory[start] = 1
        before = psutil.Process().memory_info().rss
        collapse(threading.Event())
        assert psutil.Process().memory_info().rss - before < 32 << 20  # all of it: 64 MiB
