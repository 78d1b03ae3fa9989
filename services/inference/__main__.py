"""`python -m services.inference`."""

import importlib.util
import sys

from services.runtime.machine import memory

if importlib.util.find_spec("onnxruntime") is None:
    print("worker: onnxruntime is missing; pip install 'ringmesh-server[cpu]' (or [gpu])", file=sys.stderr)
    sys.exit(2)

memory.use_tcmalloc()

from services.inference.main import main  # noqa: E402

main()
