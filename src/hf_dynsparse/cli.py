"""The commands of `hf-dynsparse` that look at sparse models, convert and push them, and estimate a run."""

import argparse
import json
import logging
import sys
import webbrowser
from collections.abc import Callable, Sequence
from functools import partial
from math import ceil, inf
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from hf_dynsparse_cli import Parser

from .blocks.distributions import DISTRIBUTIONS
from .blocks.sizes import BlockSize, parse_block_size
from .files import write_atomically
from .models.bert.configuration_dynsparse_bert import PRESETS
from .topology import SCHEDULES
from .training.bars import hide_bars


logger = logging.getLogger(__name__)

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "B": 10**9}
SOURCE = "a folder, or a repository of the Hub as user/name or user/name@revision"


def run_command(argv: Sequence[str]) -> None:
    """
    Run one of the commands of this module: its name and the arguments that follow.

    Raises:
        SystemExit: with status 2 and one line on the standard error stream, if something is wrong.
    """
    parser = _parser()
    args = parser.parse_args(argv)
    # Its complaints that torchvision is not installed concern nobody here.
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    hide_bars()
    try:
        args.run(args)
    except StrictDataclassError as error:
        parser.error(str(error.__cause__ or error))  # what a configuration objects to, without the validator's name
    except (ValueError, OSError, ImportError, SafetensorError) as error:
        parser.error(str(error))


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="hf-dynsparse")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for add in (_add_inspect, _add_estimate, _add_convert, _add_push, _add_card, _add_report, _add_animate, _add_fill):
        add(commands)
    return parser


def _command(
    commands: Any, run: Callable[[argparse.Namespace], None], examples: Sequence[str]
) -> argparse.ArgumentParser:
    name = run.__name__.removeprefix("_")
    epilog = "\n".join(["examples:", *(f"  hf-dynsparse {name} {example}" for example in examples)])
    parser: argparse.ArgumentParser = commands.add_parser(name, description=run.__doc__, epilog=epilog)
    parser.set_defaults(run=run)
    return parser


def _say(text: object) -> None:
    sys.stdout.write(f"{text}\n")


def _write_json(content: dict[str, Any], file: Path | None) -> None:
    if file is not None:
        write_atomically(file, json.dumps(content, indent=2) + "\n")


def _positive(text: str) -> int:
    return _whole(text, 1, 10**12)


def _tokens(text: str) -> int:
    number, unit = (text[:-1], text[-1].upper()) if text[-1:].upper() in UNITS else (text, "")
    if not number.replace(".", "", 1).isdecimal() or not 1 <= float(number) * UNITS[unit] <= 10**15:
        raise argparse.ArgumentTypeError(f"must be a number such as 900000, 60M or 1.5G. Got {text[:40]!r}.")
    return round(float(number) * UNITS[unit])


def _rate(text: str) -> float:
    rate = float(text)
    if not 0.0 < rate < inf:
        raise argparse.ArgumentTypeError(f"must be positive and finite. Got {text!r}.")
    return rate


def _updates(text: str) -> int:
    return _whole(text, 0, 10**6)


def _whole(text: str, least: int, most: int) -> int:
    if not text.isdecimal() or len(text) > len(str(most)) or not least <= int(text) <= most:
        raise argparse.ArgumentTypeError(f"must be a number from {least} to {most:,}. Got {text[:40]!r}.")
    return int(text)


def _block_size(text: str) -> BlockSize:
    try:
        return parse_block_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _add_sparsity(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sparsity", type=float, help="share of inactive positions (default: 0.9)")
    sizes = "side of a block, ROWSxCOLUMNS, or for a BERT by layer such as *attention*=4,*=16 (default: 16)"
    parser.add_argument("--block_size", type=_block_size, help=sizes)
    parser.add_argument("--distribution", choices=list(DISTRIBUTIONS), help="of the density over the layers")


def _sparsity(args: argparse.Namespace) -> dict[str, Any]:
    """What was given of the options of `_add_sparsity`."""
    given = {name: getattr(args, name) for name in ("sparsity", "block_size", "distribution")}
    return {name: value for name, value in given.items() if value is not None}


def _add_inspect(commands: Any) -> None:
    examples = ["runs/medium-s90-b16", "user/name@v1 --json report.json --picture blocks.png"]
    parser = _command(commands, _inspect, examples)
    parser.add_argument("source", metavar="PATH_OR_REPO", help=f"{SOURCE}, or one safetensors file")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report there too")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw which blocks of each layer are active")


def _inspect(args: argparse.Namespace) -> None:
    """Show the layers of a saved model, their densities and sizes. Headers and block indices are read, no weights."""
    from .reports.inspection import inspect_checkpoint
    from .reports.pictures.layers import plot_layer_maps

    report = inspect_checkpoint(args.source)
    _say(report)
    _write_json(report.to_dict(), args.json)
    if args.picture is not None:
        maps = {layer.name: layer.layout.to_mask().numpy() for layer in report.layers}
        plot_layer_maps(maps, args.picture, title=args.source)


def _add_estimate(commands: Any) -> None:
    examples = [
        "--preset base --sparsity 0.9 --block_size 16",
        "--preset medium --block_size 1 --num_topology_updates 160 --max_steps 757000 --batch_size 512",
        "--preset mini --vocab_size 8192 --batch_size 32 --tokens 60M --trial",
        "--model_type modernbert --preset mini --block_size 4",
    ]
    parser = _command(commands, _estimate, examples)
    parser.add_argument("--preset", choices=list(PRESETS), required=True, help="size of the BERT")
    known = "architecture, such as modernbert, roberta, electra or distilbert (default: %(default)s)"
    parser.add_argument("--model_type", default="dynsparse_bert", help=known)
    _add_sparsity(parser)
    parser.add_argument("--vocab_size", type=_positive, default=30522, help="default: %(default)s")
    parser.add_argument("--max_seq_length", type=_positive, default=128, help="tokens a sequence (default: 128)")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--max_steps", type=_positive, help="optimiser steps of the run")
    length.add_argument("--tokens", type=_tokens, help="of the run, such as 60M; instead of --max_steps")
    parser.add_argument("--batch_size", type=_positive, help="sequences in each step, of all processes")
    trial = "train on made-up text for so many seconds (default: 20), and tell how long steps and the run take here"
    parser.add_argument("--trial", type=_rate, nargs="?", const=20.0, metavar="SECONDS", help=trial)
    parser.add_argument("--bf16", action="store_true", help="mixed precision, in the trial")
    parser.add_argument("--num_topology_updates", type=_updates, help="default: 80, or one in 100 steps; 0 is static")
    parser.add_argument("--pruning_ratio", type=float, default=0.5, help="of the first update (default: 0.5)")
    parser.add_argument("--pruning_schedule", choices=list(SCHEDULES), default="cosine", help="default: cosine")
    parser.add_argument("--readmit", action="store_true", help="a pruned block may return in the same update")
    parser.add_argument("--dense_learning_rate", type=_rate, help="of the dense twin (default: the paper's best)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the estimate there too")


def _estimate(args: argparse.Namespace) -> None:
    """
    Estimate sizes, FLOPs, coverage and learning rate of a pre-training run. Nothing is allocated or trained, but in a
    --trial.
    """
    from .models.presets import preset_model, preset_on_meta
    from .reports.estimate import estimate_run, plateau_warning

    size, how = (args.model_type, args.preset, args.vocab_size), _sparsity(args)
    batch_size = args.batch_size or (32 if args.trial else None)
    max_steps = args.max_steps
    if args.bf16 and not args.trial:
        raise ValueError("--bf16 is for the steps of a --trial. Got none. Give it too, or leave --bf16 out.")
    if args.tokens is not None:
        if batch_size is None:
            raise ValueError("--tokens are shared out over steps: give --batch_size too. Got none.")
        max_steps = ceil(args.tokens / (batch_size * args.max_seq_length))
    estimate = estimate_run(
        preset_on_meta(*size, **how),
        seq_len=args.max_seq_length,
        max_steps=max_steps,
        batch_size=batch_size,
        num_topology_updates=args.num_topology_updates,
        pruning_ratio=args.pruning_ratio,
        pruning_schedule=args.pruning_schedule,
        readmit=args.readmit,
        dense_learning_rate=args.dense_learning_rate,
    )
    _say(estimate)
    report = estimate.to_dict()
    if args.trial:
        from .training.twins import describe_twins, format_twins, try_twins

        build = partial(preset_model, *size, **how)
        length = {"batch_size": batch_size, "seq_len": args.max_seq_length}
        report["trial"] = describe_twins(try_twins(build, args.trial, bf16=args.bf16, **length), max_steps)
        _say(f"\n{format_twins(report['trial'])}")
    warning = plateau_warning(estimate.sequences * args.max_seq_length)
    if warning is not None:
        logger.warning("%s", warning)
    _write_json(report, args.json)


def _add_convert(commands: Any) -> None:
    examples = [
        "bert-base-uncased sparse-bert --to sparse --sparsity 0.9 --block_size 16",
        "bert-base-uncased fitted-bert --sparsity 0.8 --block_size 16 --calibration text.txt",
        "bert-base-uncased sparser-bert --sparsity 0.9 --block_size 16 --statistics statistics.safetensors",
        "runs/medium-s90-b16 medium-dense --to dense",
        "runs/medium-s90-b16 medium.onnx --to onnx",
        "runs/medium-s90-b16 medium-bsr.safetensors --to bsr",
    ]
    parser = _command(commands, _convert, examples)
    parser.add_argument("source", metavar="SOURCE", help=SOURCE)
    parser.add_argument("target", metavar="TARGET", help="a new folder; a new file for onnx and bsr")
    parser.add_argument("--to", choices=["sparse", "dense", "onnx", "bsr"], help="what to make of it")
    _add_sparsity(parser)
    calibration = "text, a sentence or paragraph a line: keep what matters most for it, and fit that"
    parser.add_argument("--calibration", metavar="FILE", help=calibration)
    parser.add_argument("--calibration_samples", type=_positive, help="lines of it to use (default: 512)")
    saved = "keep what the dense model reads of it, to prune by it again, to another sparsity"
    parser.add_argument("--save_statistics", metavar="FILE", help=saved)
    parser.add_argument("--statistics", metavar="FILE", help="such a file, in the place of text")


def _convert(args: argparse.Namespace) -> None:
    """Convert a saved model. What stands at the target already is never overwritten."""
    from .checkpoints import export

    settings = _sparsity(args)
    by = {"calibration", "calibration_samples", "save_statistics", "statistics"}
    settings |= {name: value for name, value in vars(args).items() if name in by and value is not None}
    if args.to is None and not settings:
        raise ValueError("the following arguments are required: --to")
    if "calibration_samples" in settings and "calibration" not in settings:
        raise ValueError("--calibration_samples are lines of a --calibration FILE. Got none. Give it too.")
    if "save_statistics" in settings and "calibration" not in settings:
        raise ValueError("--save_statistics are those of a --calibration FILE. Got none. Give it too.")
    if "statistics" in settings and "calibration" in settings:
        raise ValueError("--statistics take the place of --calibration. Got both. Leave one out.")
    if args.to in (None, "sparse"):
        export.sparsify_checkpoint(args.source, args.target, **settings)
    elif settings:
        raise ValueError(f"--{next(iter(settings))} needs --to sparse. Got --to {args.to}. Leave it out.")
    else:
        {"dense": export.export_dense, "onnx": export.export_onnx, "bsr": export.export_bsr}[args.to](
            args.source, args.target
        )
    _say(f"{args.target}: written")


def _add_push(commands: Any) -> None:
    examples = ["runs/medium-s90-b16 user/name", "runs/medium-s90-b16 user/name --private --tag v1 --with_code"]
    parser = _command(commands, _push, examples)
    parser.add_argument("folder", metavar="FOLDER", help="a saved model")
    parser.add_argument("repo_id", metavar="REPO", help="user/name; made if there is none")
    parser.add_argument("--private", action="store_true", default=None, help="only you can see it")
    parser.add_argument("--revision", help="branch (default: main)")
    parser.add_argument("--message", help="of the commit")
    parser.add_argument("--tag", help="for the commit, such as v1")
    parser.add_argument("--with_code", action="store_true", help="add code that loads it without this package")


def _push(args: argparse.Namespace) -> None:
    """Put a saved model on the Hub, with its tokenizer and card. Log in first: hf auth login."""
    from .hub import push_folder

    commit = push_folder(
        args.folder,
        args.repo_id,
        private=args.private,
        revision=args.revision,
        commit_message=args.message,
        with_code=args.with_code,
        tag=args.tag,
    )
    _say(commit.commit_url)


def _add_card(commands: Any) -> None:
    examples = ["runs/medium-s90-b16", "demo-output/sparse --to model_cards/mini-s90 --with_weights"]
    parser = _command(commands, _card, examples)
    parser.add_argument("folder", metavar="FOLDER", help="a saved model")
    parser.add_argument(
        "--to", type=Path, metavar="FOLDER", help="another folder, which names the model (default: its own)"
    )
    parser.add_argument("--with_weights", action="store_true", help="put the model there too; needs --to")


def _card(args: argparse.Namespace) -> None:
    """Write README.md of a saved model from its configuration and the history of its run."""
    from .reports.model_card import write_model_card

    if args.with_weights and args.to is None:
        raise ValueError(f"--with_weights copies the model to another folder. Got {args.folder} alone. Give --to too.")
    named = {} if args.to is None else {"model_name": args.to.resolve().name}
    _say(write_model_card(args.folder, args.to, with_weights=args.with_weights, **named))


def _add_report(commands: Any) -> None:
    examples = [
        "runs/medium-s90-b16 --open",
        "runs/static runs/dynamic runs/dense --output comparison.html",
        "runs/medium-s90-b16 --watch 30 --open",
        'runs/medium-s90-b16 --fill "The weather was [MASK] today."',
    ]
    parser = _command(commands, _report, examples)
    parser.add_argument("runs", type=Path, metavar="RUN", nargs="+", help="output folder of a run, finished or not")
    where = "default: report.html in RUN; of several runs, here"
    parser.add_argument("--output", type=Path, metavar="FILE", help=where)
    parser.add_argument("--open", action="store_true", help="in the browser")
    watch = "write it again every so many seconds (default: 10) until the runs are finished; the open page follows"
    parser.add_argument("--watch", type=_rate, nargs="?", const=10.0, metavar="SECONDS", help=watch)
    fill = "text with [MASK] for the models to fill, as often as you like (default: a few, if the model is small)"
    parser.add_argument("--fill", metavar="TEXT", action="append", help=fill)


def _report(args: argparse.Namespace) -> None:
    """Write one page, which needs nothing but a browser: summary, curves, block maps, kernels, filled masks."""
    from .reports.facts import PAGE_FILE
    from .reports.page.write import watch_page, write_page

    output = args.output or Path(args.runs[0] if len(args.runs) == 1 else ".", PAGE_FILE)

    def written() -> None:
        _say(output)
        if args.open:
            webbrowser.open(output.resolve().as_uri())

    if args.watch is None:
        write_page(args.runs, output, args.fill)
        written()
    else:
        watch_page(args.runs, output, args.watch, args.fill, written)


def _add_animate(commands: Any) -> None:
    examples = ["runs/medium-s90-b16", "runs/medium-s90-b16 --output topology.gif --seconds 12"]
    parser = _command(commands, _animate, examples)
    parser.add_argument("folder", metavar="RUN_FOLDER", help="output folder of a run, finished or not")
    parser.add_argument("--output", type=Path, metavar="FILE", help="default: topology.gif in RUN_FOLDER")
    parser.add_argument("--seconds", type=float, default=8.0, help="how long it runs (default: %(default)g)")


def _animate(args: argparse.Namespace) -> None:
    """Draw how the topology of one layer evolved in a run, a frame after every update."""
    from .reports.pictures.animation import animate_block_map
    from .topology.frames import HISTORY_FOLDER, read_history

    frames = read_history(args.folder)
    if not frames:
        raise ValueError(
            f"RUN_FOLDER must hold a history of the topology. Got {args.folder} without {HISTORY_FOLDER}. Train with "
            "examples/run_mlm_dynsparse.py, or with the callback `TopologyHistory`."
        )
    output = args.output or Path(args.folder, "topology.gif")
    animate_block_map(frames, output, seconds=args.seconds)
    _say(output)


def _add_fill(commands: Any) -> None:
    examples = [
        'runs/medium-s90-b16 "If the file does not [MASK], an error is raised."',
        'demo-output/sparse --beside demo-output/dense --top 5 "Whether or [MASK] to sort."',
    ]
    parser = _command(commands, _fill, examples)
    parser.add_argument("model", metavar="MODEL", help=SOURCE)
    parser.add_argument("texts", metavar="TEXT", nargs="+", help="text with [MASK] where a word is missing")
    parser.add_argument(
        "--beside", metavar="MODEL", action="append", default=[], help="another one; as often as you like"
    )
    parser.add_argument("--top", type=_positive, default=3, help="pieces at each mask (default: %(default)d)")


def _fill(args: argparse.Namespace) -> None:
    """Fill the masks of texts by one or more masked language models, sparse or dense, side by side."""
    from .reports.masks import fill_masks, mask_rows
    from .reports.tables import plain_table

    models = {source: source for source in (args.model, *args.beside)}
    rows = mask_rows(fill_masks(models, args.texts, args.top))
    _say(plain_table(rows, left=range(len(rows[0]))))
