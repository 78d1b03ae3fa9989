import json
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from services.runtime.machine import compiled

HAS_COMPILER = shutil.which("cc") and Path(sysconfig.get_path("include"), "Python.h").exists()
TCMALLOC = Path(sys.prefix, "lib", "libtcmalloc_minimal.so.4")
SAY = """
import json, sys
from services.runtime.process import start
start.prepare()
from services.runtime.machine import compiled, memory
import router.request.service
print(json.dumps([compiled.is_used(), memory.has_tcmalloc(), router.request.service.__file__, sys.argv]))
"""


def imported(folder, *, code=SAY, **environment):
    done = subprocess.run(
        [sys.executable, "-c", code, "an argument"],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture
def checkout(tmp_path):
    for package in ("router", "cache", "services"):
        shutil.copytree(compiled.ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


@pytest.mark.skipif(not HAS_COMPILER, reason="nothing was compiled: there is no C compiler, or no Python.h")
def test_a_service_runs_what_was_compiled_from_the_sources_that_are_there():
    used, _, file, arguments = imported(compiled.ROOT)
    assert used
    assert file == str(compiled.folder() / "router/request" / f"service{sysconfig.get_config_var('EXT_SUFFIX')}")
    assert arguments == ["-c", "an argument"]


@pytest.mark.parametrize(
    "changed", ["router/request/service.py", "services/runtime/errors.py"], ids=["compiled", "imported"]
)
def test_after_a_change_the_sources_run_and_not_what_was_compiled_before(checkout, changed):
    source = checkout / changed
    source.write_text(source.read_text() + "# changed\n")
    used, _, file, _ = imported(checkout)
    assert not used
    assert file == str(checkout / "router/request/service.py")


@pytest.mark.skipif(not TCMALLOC.exists(), reason="tcmalloc could not be had")
def test_a_process_has_tcmalloc_where_it_is_found_and_nothing_else_is_preloaded():
    _, has, _, _ = imported(compiled.ROOT)
    assert has
    _, has, _, _ = imported(compiled.ROOT, LD_PRELOAD="")
    assert not has


def test_every_module_that_is_to_be_compiled_is_there():
    assert [source for source in compiled.sources() if not (compiled.ROOT / source).is_file()] == []
    assert list(compiled.MODULES) == sorted(compiled.MODULES)
