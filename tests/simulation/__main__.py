"""`python -m tests.simulation`: many seeds on all cores, or one with all that happens in it."""

import argparse
import os
import sys

from tests.simulation import many


def main():
    """Exits with 1 if a seed fails."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument("--seed", type=int, help="run this one")
    parser.add_argument("--trace", action="store_true", help="print every event of it")
    parser.add_argument("--seeds", type=int, default=500, help="run so many")
    parser.add_argument("--first", type=int, default=0, help="beginning with this one")
    parser.add_argument("--plan", default="", help="let every seed follow this plan")
    parser.add_argument("--digests", action="store_true", help="tell the digest of each")
    parser.add_argument("--until-found", action="store_true", help="stop at the first that fails")
    parser.add_argument("--jobs", type=int, default=0, help="processes; 0: one for each core")
    options = parser.parse_args()
    if os.environ.get("PYTHONHASHSEED") != "0":
        # Without a fixed hash seed, the order of a set of strings differs by process.
        os.execve(
            sys.executable,
            [sys.executable, "-m", "tests.simulation", *sys.argv[1:]],
            os.environ | {"PYTHONHASHSEED": "0"},
        )
    if options.seed is not None:
        many.prepare()
        from tests.simulation.run import run

        result = run(options.seed, options.plan, print if options.trace else None)
        print(f"seed {result.seed} {result.plan} {result.events} events, digest {result.digest}")
        _tell(result, options.plan)
        sys.exit(bool(result.violations))
    sys.exit(many.run(options, _tell))


def _tell(result, plan):
    for violation in result.violations[:5]:
        print(f"seed {result.seed} ({result.plan}): {violation}")
    if len(result.violations) > 5:
        print(f"seed {result.seed}: and {len(result.violations) - 5} more")
    if result.violations:
        more = f" --plan {plan}" if plan else ""
        print(f"  replay: python -m tests.simulation --seed {result.seed}{more} --trace", flush=True)


if __name__ == "__main__":
    main()
