"""`python -m services.inference`."""

import importlib.util
import sys

from services.runtime.process import start

if importlib.util.find_spec("onnxruntime") is None:
    print("worker: onnxruntime is missing; pip install 'ringmesh-server[cpu]' (or [gpu])", file=sys.stderr)
    sys.exit(2)

start.prepare()

from services.inference.main import main  # noqa: E402

main()
