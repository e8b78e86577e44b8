#!/usr/bin/env python
# /// script
# requires-python = ">=3.11"
# dependencies = ["hf_dynsparse[plots]"]
#
# [tool.uv.sources]
# hf_dynsparse = { path = ".." }
# ///
"""
A sparse encoder and its dense twin, pre-trained for the same time on text that is on the machine anyway, and compared:
what they cost, what they reach, and how they fill the masks of five sentences.

    python examples/demo.py                                  # as `make demo` and `hf-dynsparse train demo` do
    python examples/demo.py --block_size 16 --seed 1         # flags of run_mlm_dynsparse.py, for both models
    python examples/demo.py --dense_baseline                 # the dense twin alone, for the steps of the sparse model

    sparse          trains first
    dense_trial     a twentieth of its steps by the dense twin, to learn how long those take here
    dense           the dense twin, for as many steps as fit the seconds of the sparse model

Both have the same width, head, tokenizer, data and seed. Finished runs are kept and interrupted ones go on from their
last checkpoint, so the same command completes a demo. Writes a folder for each run, as run_mlm_dynsparse.py does, and
demo.md with loss.png and topology.gif.
"""

import argparse
import json
import logging
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import run_mlm_dynsparse as mlm
from study.jobs import StudyParser
from study.runs import mean_newborn_share

from hf_dynsparse.files import write_atomically
from hf_dynsparse.reports.masks import fill_masks, mask_rows
from hf_dynsparse.reports.pictures.animation import animate_block_map
from hf_dynsparse.reports.pictures.runs import plot_over_seconds
from hf_dynsparse.reports.tables import markdown_table, plain_table
from hf_dynsparse.topology.frames import read_history
from hf_dynsparse.training.plugins import load_plugins
from hf_dynsparse.training.scripts import check_topology, one_line_errors
from hf_dynsparse.training.threads import default_threads


logger = logging.getLogger("demo")

# For a few minutes on two cores: two layers of a ModernBERT, which needs fewer tokens than a BERT. Updates are rare,
# so that new blocks can live.
FLAGS = ["--model_type=modernbert", "--config_overrides=num_hidden_layers=2", "--vocab_size=4096", "--max_steps=2200"]
FLAGS += ["--num_topology_updates=3"]
TRIAL = 20  # the trial of the dense twin has so many times fewer steps

# In each of them the neighbours of the mask say what the frequencies of words do not.
SENTENCES = (
    "Whether or [MASK] to include the index in the result.",
    "The default [MASK] is used if the argument is not given.",
    "If the file does not [MASK], an error is raised.",
    "See the documentation for more [MASK].",
    "Return true if the object is an [MASK] of the class.",
)

# What is compared: key of summary.json, how it is written, what it is divided by.
ROWS = {
    "evaluation loss (nats)": ("eval_loss", "{:.3f}", 1),
    "perplexity": ("perplexity", "{:,.1f}", 1),
    "context gain (nats)": ("context_gain", "{:.3f}", 1),
    "seconds of training": ("seconds", "{:,.0f}", 1),
    "steps": ("steps", "{:,.0f}", 1),
    "tokens": ("tokens", "{:,.0f}", 1),
    "training FLOPs": ("flops", "{:.2e}", 1),
    "MB of the checkpoint": ("checkpoint_bytes", "{:.2f}", 1e6),
    "MB of its encoder": ("encoder_bytes", "{:.2f}", 1e6),
    "positions that were ever active": ("coverage", "{:.1%}", 1),
    "newborn share of pruned blocks": ("newborn_share", "{:.2f}", 1),
}


def main() -> None:
    """Check, train what is missing, compare."""
    own, flags = parse_arguments()
    output = Path(own.output_dir)
    with one_line_errors():
        check(flags, output)
    if own.dense_baseline:
        train(output / "dense_baseline", [*flags, "--dense_baseline"])
        return
    sparse = train(output / "sparse", flags)
    twin = [*flags, "--dense_baseline", f"--tokenizer_name={output / 'sparse'}"]
    steps = max(min(10, sparse["steps"]), sparse["steps"] // TRIAL)
    alone = ["--eval_strategy=no", "--save_strategy=no", "--max_eval_samples=64"]
    print("\nA trial of the dense twin, too short to learn: how many of its steps take as long?", flush=True)
    trial = train(output / "dense_trial", [*twin, f"--max_steps={steps}", *alone])
    steps = max(1, round(sparse["seconds"] / trial["seconds"] * trial["steps"]))
    dense = train(output / "dense", [*twin, f"--max_steps={steps}"])
    report({"sparse": sparse, "dense": dense}, output)


def parse_arguments() -> tuple[argparse.Namespace, list[str]]:
    """The flags of this script, and those for run_mlm_dynsparse.py."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="All other flags are those of run_mlm_dynsparse.py, for every run.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--output_dir", default="demo-output", help="where everything is written (default: %(default)s)"
    )
    parser.add_argument("--dense_baseline", action="store_true", help="train the dense twin only")
    own, given = parser.parse_known_args()
    return own, [*FLAGS, *given]


def check(flags: list[str], output: Path) -> None:
    """
    Refuse, before anything runs, flags with which a run would stop at its start, and others than the demo in this
    folder was begun with, which are noted there.

    Raises:
        ValueError: naming what does not fit.
    """
    load_plugins(flags)
    for more in ([], ["--dense_baseline", "--max_steps=1"]):
        model_args, data_args, args = StudyParser(mlm.ARGUMENTS).parse_args_into_dataclasses([*flags, *more])
        mlm.check(model_args, data_args, args)
        check_topology(args)
        mlm.build_config(model_args, data_args, args, None)
    if args.push_to_hub:
        raise ValueError(
            "The demo trains several models. Got --push_to_hub. Leave it out, and push one: hf-dynsparse push "
            f"{output / 'sparse'} user/name."
        )
    if args.world_size > 1:
        raise ValueError(f"The demo trains in one process. Got {args.world_size}. Give --num_processes 1.")
    begun = output / "demo.json"
    if begun.exists() and (before := json.loads(begun.read_text())["flags"]) != flags:
        raise ValueError(
            f"A demo goes on with the flags that it was begun with: {' '.join(before)} in {output}. Got "
            f"{' '.join(flags)}. Give another --output_dir, or remove that folder."
        )
    output.mkdir(parents=True, exist_ok=True)
    write_atomically(begun, json.dumps({"flags": flags}) + "\n")


def train(folder: Path, flags: Sequence[str]) -> dict[str, Any]:
    """The summary of a run, which is trained, or trained to its end, if there is none."""
    if not (folder / "summary.json").exists():
        start([*flags, f"--output_dir={folder}", "--resume_from_checkpoint=last"])
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return summary


def start(flags: Sequence[str]) -> None:
    """run_mlm_dynsparse.py in a process of its own: nothing of one run is left for the next. Its failure is ours."""
    # Of this process, which knows whether a launcher or the user has set the number that the next one inherits.
    threads = f"--num_threads={default_threads(1)}"
    process = subprocess.Popen([sys.executable, mlm.__file__, threads, *flags])
    while process.poll() is None:
        with suppress(KeyboardInterrupt):  # Ctrl-C tells it too: it ends in its own way
            process.wait()
    if process.returncode:
        sys.exit(process.returncode)


def report(summaries: dict[str, dict[str, Any]], output: Path) -> None:
    """Print and write both tables, and draw the pictures."""
    logs = {name: json.loads((output / name / "trainer_state.json").read_text())["log_history"] for name in summaries}
    summaries["sparse"]["newborn_share"] = mean_newborn_share(logs["sparse"])
    rows = [
        [what, *(form.format(run[key] / unit) if run.get(key) is not None else "-" for run in summaries.values())]
        for what, (key, form, unit) in ROWS.items()
        if summaries["sparse"].get(key) is not None
    ]
    guesses = mask_rows(fill_masks({name: output / name for name in summaries}, SENTENCES))
    pictures = draw({name: (log, summaries[name]["seconds"]) for name, log in logs.items()}, output)
    table = [["", *summaries], *rows]
    versions = ", ".join(f"{package} {version}" for package, version in summaries["sparse"]["versions"].items())
    where = f"Seed {summaries['sparse']['seed']}, {summaries['sparse']['hardware']}, {versions}."
    text = [
        "# A sparse encoder beside its dense twin, trained for the same time",
        where,
        *(markdown_table(table[0], rows, right=(1, 2)), markdown_table(guesses[0], guesses[1:])),
        *(f"![{about}]({picture})" for picture, about in pictures.items()),
    ]
    write_atomically(output / "demo.md", "\n\n".join(text) + "\n")
    print(f"\n{plain_table(table)}\n\n{plain_table(guesses, left=range(3))}\n\nResults in {output / 'demo.md'}.")


def draw(runs: dict[str, tuple[list[dict[str, Any]], float]], output: Path) -> dict[str, str]:
    """Pictures of a demo, by their files, and what they show."""
    pictures = {"sparse/block_map.png": "Blocks of one layer: at the start, wherever one was active, at the end"}
    try:
        plot_over_seconds(runs, output / "loss.png")
        pictures["loss.png"] = "Loss against seconds of training"
        if frames := read_history(output / "sparse"):
            animate_block_map(frames, output / "topology.gif")
            pictures["topology.gif"] = "Blocks of one layer over the run"
    except (ImportError, ValueError) as error:
        logger.warning("No pictures: %s", error)
    return {name: about for name, about in pictures.items() if (output / name).exists()}


if __name__ == "__main__":
    main()
