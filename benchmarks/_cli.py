"""The part of the command line that all benchmarks share, and the JSON they write."""

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from _machine import one_line, read_machine
from _timing import choose_clock
from huggingface_hub.errors import StrictDataclassError

from hf_dynsparse import configure_kernels, keep_freed_memory
from hf_dynsparse.ops.choice import TUNING_MODES
from hf_dynsparse.training.bars import hide_bars


SEED = 0

BlockSize = int | tuple[int, int]
Row = dict[str, Any]


def make_parser(file: str, description: str | None, repeats: int) -> argparse.ArgumentParser:
    """A parser with the flags of every benchmark, for the script `file`."""
    parser = argparse.ArgumentParser(
        Path(file).name, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write rows, machine and versions to this file")
    parser.add_argument("--quick", action="store_true", help="a small choice, under a minute; other flags still count")
    parser.add_argument("--threads", type=int, help="CPU threads (PyTorch's choice); 1 is timed by CPU time")
    parser.add_argument("--repeats", type=int, default=repeats, help="timed turns (%(default)s)")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="cpu or cuda (%(default)s)")
    parser.add_argument(
        "--keep_freed_memory",
        action="store_true",
        help="let the C library keep freed memory instead of returning it to the system, for all sides alike",
    )
    parser.add_argument(
        "--kernel_tuning",
        choices=TUNING_MODES,
        default="once",
        help="time the backends and keep the result on disk (once), time them again (force), or follow a rule (off)",
    )
    return parser


def run(
    parser: argparse.ArgumentParser,
    measure: Callable[[argparse.Namespace], list[Row]],
    argv: Sequence[str] | None,
    quick: dict[str, Any],
) -> None:
    """Parse, print the machine, measure, write the JSON. A refusal or a wrong flag ends in one line and status 1."""
    if parser.parse_args(argv).quick:
        parser.set_defaults(**quick)
    args = parser.parse_args(argv)
    if args.repeats < 1:
        parser.error(f"`--repeats` must be at least 1. Got {args.repeats}.")
    prepare_process(args)
    hide_bars()
    machine = read_machine(args.device, SEED) | {"clock": choose_clock(args.device).name}
    print(f"{one_line(machine)}\nclock: {machine['clock']}; medians of {args.repeats} turns", flush=True)
    try:
        rows = measure(args)
    except (OSError, ValueError, StrictDataclassError) as error:
        raise SystemExit(f"{parser.prog}: {error}") from error
    if args.json:
        command = shlex.join(["python", f"benchmarks/{parser.prog}", *(sys.argv[1:] if argv is None else argv)])
        content = {"benchmark": Path(parser.prog).stem, "command": command, "machine": machine, "rows": rows}
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(content, indent=1) + "\n")


def prepare_process(args: argparse.Namespace) -> None:
    """Threads, seed and allocator: the same for all sides."""
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(SEED)
    configure_kernels(tuning=args.kernel_tuning)
    if args.keep_freed_memory and not keep_freed_memory():
        raise SystemExit("`--keep_freed_memory` needs glibc. Leave it out.")


def shared_fields(args: argparse.Namespace) -> Row:
    """Fields that every row has."""
    return {
        "device": args.device.type,
        "threads": torch.get_num_threads(),
        "keep_freed_memory": args.keep_freed_memory,
    }


def pair(text: str) -> tuple[int, int]:
    """`768x3072` as two integers."""
    first, _, second = text.partition("x")
    try:
        return int(first), int(second)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be two integers such as 768x3072. Got {text!r}.") from None


def block_size(text: str) -> BlockSize:
    """`16`, or `1x4` for a rectangle."""
    return pair(text) if "x" in text else int(text)


def label(size: BlockSize) -> int | str:
    """A block size as the command line takes it."""
    return size if isinstance(size, int) else f"{size[0]}x{size[1]}"
