import json
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from setup import compiled_sources
from tests import installation
from tests.unit.conftest import compiled_modules, imports_compiled

UNIT = installation.ROOT / "tests" / "unit"
TCMALLOC = Path(sys.prefix, "lib", "libtcmalloc_minimal.so.4")
SAY = """
import json, sys
from services.runtime.machine import startup
startup.use_tcmalloc()
from router.request import service
from services.runtime.machine import compiled, memory
print(json.dumps([compiled.is_used(), memory.has_tcmalloc(), service.__file__, sys.argv]))
"""
CHOOSE = f"""
import subprocess, sys
from tests import installation
installation.choose()
subprocess.run([sys.executable, "-P", "-c", {SAY!r}], check=True)
"""


def python(folder, code, **environment):
    command = [sys.executable, "-c", code, "an argument"]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def imported(folder, code, **environment):
    done = python(folder, code, **environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture
def checkout(tmp_path):
    for package in (*installation.PACKAGES, "tests"):
        ignored = shutil.ignore_patterns("__pycache__", "build")
        shutil.copytree(installation.ROOT / package, tmp_path / package, ignore=ignored)
    return tmp_path


@pytest.mark.skipif(not installation.is_compiled(), reason="nothing is compiled from these sources")
def test_what_is_installed_is_compiled_and_runs_in_processes_that_tests_start(tmp_path):
    compiled = installation.SITE_PACKAGES / "router" / "request" / f"service{sysconfig.get_config_var('EXT_SUFFIX')}"
    assert imported(tmp_path, SAY) == [True, TCMALLOC.exists(), str(compiled), ["-c", "an argument"]]
    assert imported(installation.ROOT, CHOOSE)[2] == str(compiled)


@pytest.mark.parametrize(
    "changed", ["router/request/service.py", "services/runtime/errors.py"], ids=["compiled", "imported"]
)
def test_after_a_change_the_sources_run_and_not_what_was_compiled_before(checkout, changed):
    source = checkout / changed
    source.write_text(source.read_text() + "# changed\n")
    used, _, file, _ = imported(checkout, CHOOSE)
    assert (used, file) == (False, str(checkout / "router" / "request" / "service.py"))
    refused = python(checkout, CHOOSE, RINGMESH_TEST_COMPILED="1")
    assert refused.returncode == 1
    assert "was not built from these sources" in refused.stderr


@pytest.mark.skipif(not TCMALLOC.exists(), reason="tcmalloc could not be had")
def test_a_process_has_tcmalloc_where_it_is_found_and_nothing_else_is_preloaded():
    _, has, _, _ = imported(installation.ROOT, SAY)
    assert has
    _, has, _, _ = imported(installation.ROOT, SAY, LD_PRELOAD="")
    assert not has


def test_modules_are_compiled_by_their_mark():
    sources = compiled_sources()
    assert Path("services/runtime/wire.py") in sources  # by which compiled.is_used() tells
    assert Path("services/runtime/machine/compiled.py") not in sources


def test_tests_that_name_a_compiled_module_run_on_compiled_modules_too():
    others = (file for file in UNIT.rglob("test_*.py") if file != Path(__file__))
    left_out = {file: file.read_text() for file in others if not imports_compiled(file)}
    for name in compiled_modules():
        package, _, module = name.rpartition(".")
        of_package = re.compile(rf"from {re.escape(package)} import (\([^)]*|.*)\b{module}\b")
        assert not [file for file, text in left_out.items() if name in text or of_package.search(text)], name
    assert UNIT / "router" / "membership" / "test_events.py" not in left_out  # by way of tests.unit.router.fleets
    assert UNIT / "runtime" / "machine" / "test_cores.py" in left_out
