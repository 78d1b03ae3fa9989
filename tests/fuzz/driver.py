"""One target under libFuzzer, in a process that ends as libFuzzer wants: MODULE NAME [options]."""

import importlib
import logging
import sys

import atheris

from tests.fuzz.target import TARGETS


def main() -> None:
    module, name, *options = sys.argv[1:]
    # Interpreted sources: atheris counts branches of bytecode.
    with atheris.instrument_imports(include=["cache", "jwt", "router", "services"]):
        importlib.import_module(module)
    logging.disable(logging.CRITICAL)
    atheris.Setup([sys.argv[0], *options], TARGETS[name].run)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
