"""The cache contract against a v2 server, as a table: `python -m tests.system.cache_contract`.

First `--lay-out`, then start the server on the folder, then `--address`. See docs/cache-contract.md.
"""

import argparse
from pathlib import Path

import grpc

from tests.system.cache_contract.cases import CASES
from tests.system.cache_contract.servers import KINDS, NotOfferedError, Server, clear, lay_out


def outcome(check, server):
    try:
        check(server)
    except AssertionError as broken:
        return f"**broken**: {broken}"
    except NotOfferedError as lacking:
        return f"not offered: {lacking}"
    except grpc.RpcError as error:
        return f"**error**: {error.code().name}: {error.details()}"
    return "kept"


def main():
    parser = argparse.ArgumentParser(prog="python -m tests.system.cache_contract", description=__doc__)
    parser.add_argument("--kind", choices=KINDS, required=True, help="how models lie in the folder")
    parser.add_argument("--folder", type=Path, required=True, help="the server's models")
    parser.add_argument("--lay-out", action="store_true", help="write the models there, and end")
    parser.add_argument("--address", help="host:port of its gRPC")
    arguments = parser.parse_args()
    if arguments.lay_out:
        clear(arguments.folder)
        lay_out(arguments.folder, arguments.kind)
        return
    with grpc.insecure_channel(arguments.address) as channel:
        server = Server(channel, arguments.kind, arguments.folder)
        for case in CASES:
            print(f"| {case.promise} | {case.statement} | {outcome(case.check, server)} |", flush=True)


if __name__ == "__main__":
    main()
