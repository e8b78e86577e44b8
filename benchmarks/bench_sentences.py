#!/usr/bin/env python
r"""
Seconds that saved classifiers take for 1,000 real sentences, side by side: dense, sparse, slimmed, int8.

    python benchmarks/bench_sentences.py --models dense=runs/dense pruned=runs/pruned int8=runs/int8 \
        --task_name sst2 --glue_dir glue_data --json sentences.json
    python benchmarks/bench_sentences.py --models dense=runs/dense pruned=runs/pruned --file sentences.txt --quick

The sentences are sorted by length, and padded to the longest of a batch; all models get the same. The time is that of
the models alone, without tokenisation.
"""

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from _bert import backend_of
from _cli import Row, label, make_parser, run, shared_fields
from _table import COLUMNS, heading, line
from _timing import choose_clock, median_ratio, median_seconds, time_in_turn
from transformers import AutoTokenizer, BatchEncoding, PreTrainedModel

from hf_dynsparse import configure_kernels, topology_summary
from hf_dynsparse.checkpoints.loading import load_model
from hf_dynsparse.data import GLUE_TASKS, read_glue
from hf_dynsparse.reports.facts import checkpoint_bytes


QUICK = {"sentences": 64, "repeats": 3}


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser(__file__, __doc__, repeats=5)
    parser.add_argument("--models", nargs="+", required=True, metavar="NAME=FOLDER", help="the first is the baseline")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--task_name", choices=list(GLUE_TASKS), metavar="TASK", help="sentences of a GLUE task")
    source.add_argument("--file", type=Path, help="a text file, a sentence a line")
    parser.add_argument("--glue_dir", help="folder with the official files, for --task_name")
    parser.add_argument("--sentences", type=int, default=512, help="use so many, the first ones (%(default)s)")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32], help="sentences of a batch (1 32)")
    parser.add_argument("--max_seq_length", type=int, default=128, help="tokens; longer ones are cut (%(default)s)")
    run(parser, measure, argv, QUICK)


def measure(args: argparse.Namespace) -> list[Row]:
    """One row per batch size and model."""
    folders = dict(model.partition("=")[::2] for model in args.models)
    if not all(folders.values()):
        raise ValueError(f"`--models` takes NAME=FOLDER, such as dense=runs/dense. Got {' '.join(args.models)}.")
    models = {name: load_classifier(folder).to(args.device) for name, folder in folders.items()}
    if len({(model.config.vocab_size, model.config.num_labels) for model in models.values()}) > 1:
        raise ValueError("`--models` must have one vocabulary and the same labels. Got models of several tasks.")
    tokenizer = AutoTokenizer.from_pretrained(next(iter(folders.values())))
    tokens = tokenizer(*read_sentences(args), truncation=True, max_length=args.max_seq_length)
    rows = sorted(range(len(tokens["input_ids"])), key=lambda row: len(tokens["input_ids"][row]))
    about = {
        name: {
            "model": name,
            "sentences": len(rows),
            "tokens": sum(map(len, tokens["input_ids"])),
            **describe(models[name], folders[name]),
        }
        for name in models
    }
    print(heading(COLUMNS["bench_sentences"]))
    found = []
    for batch in args.batches:
        chosen = [rows[start : start + batch] for start in range(0, len(rows), batch)]
        batches = [
            tokenizer.pad({key: [column[row] for row in some] for key, column in tokens.items()}, return_tensors="pt")
            for some in chosen
        ]
        for row in measure_batches(args, models, [each.to(args.device) for each in batches]):
            found.append({**shared_fields(args), **about[row["model"]], "batch": batch, **row})
            print(line(found[-1], COLUMNS["bench_sentences"]), flush=True)
    return found


def measure_batches(
    args: argparse.Namespace, models: dict[str, PreTrainedModel], batches: Sequence[BatchEncoding]
) -> list[Row]:
    """All models in turn over all sentences."""
    configure_kernels()  # forget what served other batches
    predictions = {name: predict(model, batches) for name, model in models.items()}
    backends = {name: backend_of(model) for name, model in models.items()}
    arms = {name: (partial(predict, model, batches),) for name, model in models.items()}
    samples = time_in_turn(arms, choose_clock(args.device), args.repeats)
    first = next(iter(models))
    sentences = len(predictions[first])
    return [
        {
            "model": name,
            "backend": backends[name],
            "seconds": 1000 * median_seconds(own) / sentences,
            "ratio_first": median_ratio(own, samples[first]),
            "same_predictions": float((predictions[name] == predictions[first]).float().mean()),
        }
        for name, own in samples.items()
    ]


@torch.inference_mode()
def predict(model: PreTrainedModel, batches: Sequence[BatchEncoding]) -> torch.Tensor:
    """The likeliest class of every sentence, int64 `(sentences,)`."""
    return torch.cat([model(**batch).logits.argmax(-1) for batch in batches])


def load_classifier(folder: str) -> PreTrainedModel:
    """
    A saved model, ready for inference.

    Raises:
        ValueError: if it is no classifier of sequences.
    """
    model = load_model(folder).eval()
    if not type(model).__name__.endswith("ForSequenceClassification") or model.config.num_labels < 2:
        raise ValueError(
            f"`--models` must be classifiers of sentences. Got {type(model).__name__} with {model.config.num_labels} "
            f"label(s) in {folder}. Fine-tune it by examples/run_glue_dynsparse.py first."
        )
    return model


def describe(model: PreTrainedModel, folder: str) -> Row:
    """Size and topology."""
    topology = topology_summary(model)
    is_int8 = any(buffer.dtype == torch.int8 for buffer in model.buffers())
    return {
        "dtype": "int8" if is_int8 else str(model.dtype).removeprefix("torch."),
        "sparsity": topology.sparsity,
        "block_size": ", ".join(sorted({str(label(layer.block_shape)) for layer in topology.layers})) or None,
        "layer_bytes": checkpoint_bytes(folder, ".layer."),
    }


def read_sentences(args: argparse.Namespace) -> list[list[str]]:
    """
    One or two columns of text.

    Raises:
        ValueError: if there is no sentence, or a task without its files.
    """
    if args.file is not None:
        found = [line for line in args.file.read_text(encoding="utf-8").splitlines() if line.strip()]
        columns = [found[: args.sentences]]
    elif args.glue_dir is None:
        raise ValueError("`--task_name` needs a `--glue_dir` with its files. Got none. Give it, or a --file.")
    else:
        rows = read_glue(args.glue_dir, args.task_name)["validation"][: args.sentences]
        columns = [rows[name] for name in GLUE_TASKS[args.task_name].sentences]
    if not columns[0]:
        raise ValueError(f"There must be at least one sentence. Got none in {args.file or args.glue_dir}.")
    return columns


if __name__ == "__main__":
    main()
