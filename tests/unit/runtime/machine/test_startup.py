"""What services import before they serve."""

import json
import subprocess
import sys

SERVICES = ["router", "cache", "services.inference", "services.console", "services.ledger"]
START = f"""
import sys
before = set(sys.modules)
from services.runtime.machine import startup
first = set(sys.modules) - before
startup.begin()
import gc, importlib, json
for service in {SERVICES}:
    importlib.import_module(service + ".main")
print(json.dumps([sorted(first), sorted(sys.modules), gc.get_stats()[2]["collections"]]))
"""


def test_a_start_imports_nothing_twice_and_nothing_that_only_some_settings_need():
    done = subprocess.run([sys.executable, "-c", START], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    first, all_of_them, full_collections = json.loads(done.stdout)
    ours = {"services", "services.runtime", "services.runtime.machine", "services.runtime.machine.startup"}
    assert {*first} <= {*ours, "__future__", "gc"}
    # Of tokens and of signatures.
    assert {"jwt", "cryptography.hazmat"}.isdisjoint(all_of_them)
    assert full_collections == 0
