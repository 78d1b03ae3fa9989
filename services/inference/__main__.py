"""`python -m services.inference`."""

import importlib.util
import sys

from services.runtime.machine import startup

if importlib.util.find_spec("onnxruntime") is None:
    print("worker: onnxruntime is missing; pip install 'ringmesh-server[cpu]' (or [gpu])", file=sys.stderr)
    sys.exit(2)

startup.use_tcmalloc()
startup.begin()

from services.inference.main import main  # noqa: E402

main()
