"""Checks the kernels on the GPU at hand, and only if every check passes measures them. scripts/gpu_check runs this.

    scripts/gpu_check --out FOLDER                    everything, at most 9 minutes on an H200
    scripts/gpu_check --out FOLDER --resume           go on where a stopped run ended
    scripts/gpu_check --out FOLDER --parts w4a16      one part; `correct` is run first whatever is named
    scripts/gpu_check --interpret --out FOLDER        the correctness suite on the CPU, tiny, by Triton's interpreter
    scripts/gpu_check --tiny --out FOLDER             every part at sizes that take no time: does all of it run at all?
    scripts/gpu_check --without scaled --out FOLDER   neither checks nor measures that family, should it never end;
                                                      pdl: nor launches that overlap (kernels/lowbit_kernels/overlap.py)
    scripts/gpu_check --dry-run                       the plan

Needs torch and triton; runs from a checkout with nothing installed. Peers are measured when they are importable
(humming-kernels; gemlite if --peers names it; IST-DASLab/marlin from the folder that LOWBIT_MARLIN names).
Exit status: 0 done; 1 a check failed, nothing was measured after it; 2 no GPU, or bad arguments; 3 stopped at
--minutes, --resume goes on.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

PARTS = ("correct", "limits", "w4a16", "w8a16", "w8a8", "cold", "host", "sanitizer", "model")
DEFAULT_PEERS = ("aten int4", "aten int8", "humming", "marlin")
OTHER_PEERS = ("gemlite",)
LEFT_OUT = ("gluon", "scaled", "pdl")
"""What may be left out: families, and launches that overlap. No table that is shipped picks them."""
DONE, FAILED, USAGE, STOPPED = 0, 1, 2, 3


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Command line; argparse exits with 2 and a sentence on a bad one."""
    parser = argparse.ArgumentParser(
        prog="scripts/gpu_check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="folder for records.jsonl, the CSV files and summary.txt")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"comma-separated, of {', '.join(PARTS)}")
    parser.add_argument("--peers", default=",".join(DEFAULT_PEERS), help="comma-separated, or none")
    parser.add_argument("--minutes", type=float, default=9.0, help="stop before a case that begins later than this")
    parser.add_argument("--resume", action="store_true", help="keep finished cases of the same sources and machine")
    parser.add_argument("--interpret", action="store_true", help="correctness on the CPU, tiny sizes")
    parser.add_argument("--tiny", action="store_true", help="tiny layers, short suite; its times mean nothing")
    parser.add_argument(
        "--without", default="", metavar="WHAT", help=f"leave out, comma-separated, of {', '.join(LEFT_OUT)}"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the plan and end")
    parser.add_argument("--sanitized-launches", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.parts = _names(parser, "--parts", options.parts, PARTS)
    allowed = (*DEFAULT_PEERS, *OTHER_PEERS)
    options.without = _names(parser, "--without", options.without, LEFT_OUT) if options.without else ()
    options.peers = () if options.peers == "none" else _names(parser, "--peers", options.peers, allowed)
    if options.out is None and not (options.dry_run or options.sanitized_launches):
        parser.error("--out FOLDER is needed")
    if not options.minutes > 0:
        parser.error(f"--minutes must be positive, got {options.minutes}")
    return options


def _names(parser: argparse.ArgumentParser, option: str, text: str, allowed: Sequence[str]) -> tuple[str, ...]:
    asked = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in asked if name not in allowed]
    if unknown or not asked:
        parser.error(f"{option}: {', '.join(unknown) or 'nothing named'}; allowed are {', '.join(allowed)}")
    return tuple(name for name in allowed if name in asked)


def main(arguments: Sequence[str]) -> int:
    """Runs the command line; the exit status."""
    options = parse(arguments)
    if options.interpret:
        os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported: it decides when a kernel is defined
    from check_device import NoGpu, about, require_gpu, without_gluon
    from check_run import Run, plan

    if options.dry_run:
        print(plan(options))
        return DONE
    import torch

    try:
        device = torch.device("cpu") if options.interpret else require_gpu()
    except NoGpu as error:
        print(f"scripts/gpu_check: {error}", file=sys.stderr)
        return USAGE
    options.without = without_gluon(options.without)
    if options.sanitized_launches:
        from check_machinery import sanitized_launches

        return sanitized_launches(options.without)
    from check_store import Store

    try:
        store = Store(options.out, about(device, tiny=options.tiny), resume=options.resume)
    except (FileExistsError, ValueError) as error:
        print(f"scripts/gpu_check: {error}", file=sys.stderr)
        return USAGE
    return Run(options, store, device, time.monotonic() + 60 * options.minutes).all()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
