"""What services import before they serve."""

import json
import subprocess
import sys

SERVICES = ["router", "cache", "services.inference", "services.console", "services.ledger"]
START = f"""
import atexit, gc, sys
atexit.register(lambda: print(gc.get_freeze_count()))
before = set(sys.modules)
from services.runtime.machine import startup
first = set(sys.modules) - before
startup.begin()
import importlib, json
for service in {SERVICES}:
    importlib.import_module(service + ".main")
print(json.dumps([sorted(first), sorted(sys.modules), gc.get_stats()[2]["collections"]]))
"""


def test_a_process_imports_nothing_twice_and_nothing_that_only_some_settings_need_and_collects_no_garbage_for_it():
    done = subprocess.run([sys.executable, "-c", START], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    told, frozen = done.stdout.splitlines()
    first, all_of_them, full_collections = json.loads(told)
    ours = {"services", "services.runtime", "services.runtime.machine", "services.runtime.machine.startup"}
    assert {*first} <= {*ours, "__future__"}
    # Of tokens and of signatures.
    assert {"jwt", "cryptography.hazmat"}.isdisjoint(all_of_them)
    assert full_collections == 0
    assert int(frozen) > 100_000  # nor are there any at the end
