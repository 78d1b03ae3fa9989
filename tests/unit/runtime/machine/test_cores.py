import os

import pytest

from services.runtime.machine import cores

CORES = len(os.sched_getaffinity(0))


def make(root, cgroup, files):
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(cgroup)
    for path, text in files.items():
        file = root / "sys/fs/cgroup" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)


@pytest.mark.parametrize(
    ("cgroup", "files", "expected"),
    [
        ("0::/\n", {"cpu.max": "50000 100000\n"}, 1),
        ("0::/\n", {"cpu.max": "max 100000\n"}, CORES),
        ("0::/\n", {"cpu.max": "6400000 100000\n"}, CORES),
        ("0::/pod/box\n", {"pod/cpu.max": "100000 100000\n", "pod/box/cpu.max": "max 100000\n"}, 1),
        ("0::/of/the/host\n", {"cpu.max": "100000 100000\n"}, 1),
        ("4:cpu,cpuacct:/box\n", {"cpu/box/cpu.cfs_quota_us": "100000", "cpu/box/cpu.cfs_period_us": "100000"}, 1),
        ("4:cpu,cpuacct:/\n", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, CORES),
        ("4:memory:/\n", {}, CORES),
        ("0::/\n", {"cpu.max": "what is this"}, CORES),
    ],
)
def test_the_least_quota_on_the_way_to_the_root_counts(tmp_path, cgroup, files, expected):
    make(tmp_path, cgroup, files)
    assert cores.available(tmp_path) == expected


def test_without_cgroups_the_affinity_counts(tmp_path):
    assert cores.available(tmp_path) == CORES
