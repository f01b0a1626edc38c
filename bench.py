"""Benchmarks: `python bench.py {rollout,executor,update} [--quick] [--json FILE]`.

One section a room, each with a function `bench_<room>(args) -> dict`: it prints a table and returns the figures for
--json.  To compare, run what is compared in one process, alternately: machines are noisy.  No room imports this file.
Reading order: any section; `main` ties them together.
"""
import argparse
import json
import os
import platform
import sys
import time

import torch
import transformers

from tools import UserError

# ---------------------------------------------------------------------------------------------------- the rollout


def bench_rollout(args) -> dict:
    raise UserError("bench rollout is being written")


# --------------------------------------------------------------------------------------------------- the executor


# ----------------------------------------------------------------------------------------------------- the update


# ------------------------------------------------------------------------------------------------------------ main


def machine() -> dict:
    """What the figures were measured on."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count(), "gpu": gpu,
            "torch": torch.__version__, "transformers": transformers.__version__,
            "date": time.strftime("%Y-%m-%d", time.gmtime())}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    rooms = parser.add_subparsers(dest="room", required=True)
    section = rooms.add_parser("rollout", help="the engine against generate per turn", allow_abbrev=False)
    section.set_defaults(bench=bench_rollout)
    for section in rooms.choices.values():
        section.add_argument("--quick", action="store_true", help="a small scale, for CI: seconds instead of minutes")
        section.add_argument("--json", metavar="FILE", help="write the figures there too")
    args = parser.parse_args()
    try:
        figures = args.bench(args) | {"machine": machine()}
        if args.json:
            with open(args.json, "w", encoding="utf-8") as file:
                json.dump(figures, file, indent=1)
    except UserError as error:
        print(f"bench.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
