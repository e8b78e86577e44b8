#!/usr/bin/env python
"""
Seconds of a BERT encoder under `torch.inference_mode`: sparse float32 and sparse int8 over stock dense float32, beside
what a dense model can have without sparsity: bfloat16, and int8 by PyTorch's dynamic quantisation.

    python benchmarks/bench_inference.py --quick
    python benchmarks/bench_inference.py --preset base --batches 1x128 32x128 --block_size 4 16 --json inference.json
    python benchmarks/bench_inference.py --preset minilm --batches 1x16 1x128 32x128 --block_size 1x4 4 16
"""

import argparse
import copy
import warnings
from collections.abc import Sequence
from functools import partial

import torch
from _bert import TOLERANCE, Arm, add_model_arguments, backend_of, build_model, make_batch, make_config
from _cli import Row, label, make_parser, pair, run, shared_fields
from _layers import relative_error, require_close
from _table import COLUMNS, heading, line
from _timing import choose_clock, median_ratio, median_seconds, time_in_turn
from transformers import PreTrainedModel

from hf_dynsparse import configure_kernels, prepare_qat_, to_int8_


QUICK = {"preset": "mini", "vocab_size": 8192}


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser(__file__, __doc__, repeats=9)
    add_model_arguments(parser, preset="base", sizes=[4, 16])
    parser.add_argument("--batches", type=pair, nargs="+", default=[(1, 128), (32, 128)], help="(1x128 32x128)")
    run(parser, measure, argv, QUICK)


def measure(args: argparse.Namespace) -> list[Row]:
    """One row per batch and side."""
    seq_len = max(length for _, length in args.batches)
    stock_arm = Arm("stock", args.preset)
    arms = [stock_arm, *(Arm("sparse", args.preset, s, size) for s in args.sparsity for size in args.block_size)]
    models = {
        (arm, "float32"): build_model(arm, make_config(arm, args.vocab_size, seq_len, 0.0), head=False)
        .to(args.device)
        .eval()
        for arm in arms
    }
    stock = models[stock_arm, "float32"]
    models[stock_arm, "bfloat16"] = copy.deepcopy(stock).to(torch.bfloat16)
    quantized = quantize(stock, args.device)
    if quantized is not None:
        models[stock_arm, "int8"] = quantized
    for arm in arms[1:]:
        models[arm, "int8"] = round_sparse(arm, models[arm, "float32"], args)
    print(heading(COLUMNS["bench_inference"]))
    return [row for batch, length in args.batches for row in measure_batch(args, models, batch, length)]


def quantize(stock: PreTrainedModel, device: torch.device) -> torch.nn.Module | None:
    """A copy with int8 weights, activations quantised on the fly, or `None` where PyTorch has no such kernels."""
    try:
        from torch.ao.quantization import quantize_dynamic

        with warnings.catch_warnings(action="ignore"):  # deprecated in favour of a package of its own
            return quantize_dynamic(stock, {torch.nn.Linear}, dtype=torch.qint8) if device.type == "cpu" else None
    except (ImportError, RuntimeError) as error:
        print(f"int8: unavailable in torch {torch.__version__} on this machine ({error})")
        return None


def round_sparse(arm: Arm, model: PreTrainedModel, args: argparse.Namespace) -> PreTrainedModel:
    """
    A copy as an int8 model of this package, which knows the range of inputs from one batch.

    Raises:
        ValueError: if its output is not that of the rounded model in floating point.
    """
    rounded = prepare_qat_(copy.deepcopy(model)).train()
    input_ids = make_batch(2, 16, args.vocab_size, args.device)["input_ids"]
    with torch.no_grad():
        rounded(input_ids)
    int8 = to_int8_(copy.deepcopy(rounded))
    found, wanted = (encode(each.eval(), input_ids) for each in (int8, rounded))
    require_close(f"the int8 output of {arm.name}", found, wanted, TOLERANCE["int8"])
    return int8


def measure_batch(
    args: argparse.Namespace, models: dict[tuple[Arm, str], torch.nn.Module], batch: int, length: int
) -> list[Row]:
    """All sides in turn on one batch; those in floating point only if their output is right."""
    configure_kernels()  # forget what served other batches
    input_ids = make_batch(batch, length, args.vocab_size, args.device)["input_ids"]
    errors = {key: output_error(key, models, input_ids) for key in models}
    steps = {key: (partial(encode, model, input_ids),) for key, model in models.items()}
    samples = time_in_turn(steps, choose_clock(args.device), args.repeats)
    stock = next(iter(samples))
    rows = []
    for (arm, dtype), own in samples.items():
        row = {
            **shared_fields(args),
            "dtype": dtype,
            "kind": arm.kind,
            "preset": arm.preset,
            "batch": batch,
            "seq_len": length,
            "vocab": args.vocab_size,
            "sparsity": arm.sparsity,
            "block_size": None if arm.block_size is None else label(arm.block_size),
            "backend": backend_of(models[arm, dtype]),
            "seconds": median_seconds(own),
            "ratio_stock": median_ratio(own, samples[stock]),
            "relative_error": errors[arm, dtype],
        }
        print(line(row, COLUMNS["bench_inference"]), flush=True)
        rows.append(row)
    return rows


@torch.inference_mode()
def encode(model: torch.nn.Module, input_ids: torch.Tensor) -> torch.Tensor:
    """Last hidden states `(batch, seq_len, hidden)`."""
    return model(input_ids).last_hidden_state


def output_error(
    key: tuple[Arm, str], models: dict[tuple[Arm, str], torch.nn.Module], input_ids: torch.Tensor
) -> float:
    """
    Relative error of the output: of sparse float32 against its dense form, of others against float32 of their kind.

    Raises:
        ValueError: if a sparse model in float32 differs by more than rounding.
    """
    arm, dtype = key
    output = encode(models[key], input_ids)
    if arm.kind != "sparse" or dtype == "int8":
        return relative_error(output, encode(models[arm, "float32"], input_ids))
    wanted = encode(models[key].to_dense().eval(), input_ids)
    return require_close(f"the output of {arm.name}", output, wanted, TOLERANCE[dtype])


if __name__ == "__main__":
    main()
