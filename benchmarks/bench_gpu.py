#!/usr/bin/env python
"""
The Triton backend on one NVIDIA GPU: what the GPU can do, whether the kernels are right, then single products, layers,
training steps and topology updates, each against dense cuBLAS in the same process. The file is written after every
part, so that a run cut short leaves what it had; `--quick` measures a few points of each part.

    python benchmarks/bench_gpu.py --json gpu.json
    python benchmarks/bench_gpu.py --parts ceilings products --quick
"""

import argparse
import json
import math
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from _bert import Arm, build_model, make_batch, make_config
from _machine import describe_machine
from torch import nn
from torch.nn.functional import linear

from hf_dynsparse import BlockSparseLinear, TopologyUpdater, sparse_layers, use_backend
from hf_dynsparse.ops import BACKENDS, reference, triton


SEED = 0
MILLISECONDS = 30  # of one sample
SAMPLES = 5

Row = dict[str, Any]
Call = Callable[..., object]


@dataclass(frozen=True)
class Plan:
    """What is measured, from a lot to a little."""

    shapes: tuple[tuple[int, int], ...] = (
        (768, 768),
        (2304, 768),
        (3072, 768),
        (768, 3072),
        (1024, 4096),
        (4096, 4096),
    )
    sides: tuple[int, ...] = (16, 32, 64, 128)
    sparsities: tuple[float, ...] = (0.75, 0.9, 0.95)
    tokens: tuple[int, ...] = (4096, 16384)
    models: tuple[tuple[str, int], ...] = (("base", 64), ("base", 256), ("large", 64))  # preset, sequences
    arms: tuple[tuple[float, int], ...] = ((0.9, 16), (0.9, 32), (0.9, 64), (0.95, 16), (0.95, 32))
    steps: int = 20


QUICK = Plan(
    shapes=((768, 768), (3072, 768)),
    sides=(16, 32, 64),
    sparsities=(0.9,),
    tokens=(16384,),
    models=(("base", 64),),
    arms=((0.9, 16), (0.9, 32)),
    steps=5,
)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write rows, machine and versions to this file")
    parser.add_argument("--quick", action="store_true", help="few shapes and small models")
    parser.add_argument("--parts", nargs="+", choices=tuple(PARTS), default=[*PARTS], help="in this order (all)")
    args = parser.parse_args(argv)
    refusal = why_not()
    if refusal:
        raise SystemExit(f"bench_gpu.py: {refusal}")
    torch.manual_seed(SEED)
    content: dict[str, Any] = {"benchmark": "bench_gpu", "machine": describe_gpu(), "rows": {}}
    print("\n".join(content["machine"].values()), flush=True)
    for part in args.parts:
        print(f"\n{part}", flush=True)
        rows = content["rows"][part] = []
        for row in PARTS[part](QUICK if args.quick else Plan()):
            rows.append(row)
            print("  ".join(f"{name} {shown(value)}" for name, value in row.items()), flush=True)
        if args.json:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps(content, indent=1) + "\n")
    print_summary(content["rows"])


def why_not() -> str | None:
    """What is missing here, or `None`."""
    if not torch.cuda.is_available():
        return "needs an NVIDIA GPU and a CUDA build of PyTorch. Found none. On a processor: bench_linear.py"
    reason = triton.why_not(torch.device("cuda"), torch.bfloat16, (16, 16))
    return None if reason is None else f"the Triton backend {reason}."


def describe_gpu() -> dict[str, str]:
    """Everything but the figures."""
    import triton as compiler

    properties = torch.cuda.get_device_properties(0)
    return {
        "machine": describe_machine(SEED),
        "compiler": f"triton {compiler.__version__}, CUDA {torch.version.cuda}",
        "gpu": f"{properties.multi_processor_count} processors, L2 {properties.L2_cache_size / 2**20:.0f} MiB",
        "nvidia-smi": driver_and_clocks(),
    }


def driver_and_clocks() -> str:
    """What explains a slow run: driver, clocks, temperature, power limit."""
    tool = shutil.which("nvidia-smi")  # some containers lack it
    if tool is None:
        return "not found"
    query = "--query-gpu=driver_version,clocks.sm,clocks.mem,clocks.max.sm,temperature.gpu,power.limit"
    return subprocess.run([tool, query, "--format=csv,noheader"], capture_output=True, text=True).stdout.strip()


def shown(value: object) -> str:
    """A figure in four digits."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def graph_seconds(call: Call, operands: Sequence[tuple[torch.Tensor, ...]]) -> float:
    """
    Median seconds of one call, replayed from a CUDA graph of a call on each of the `operands`: without the time that
    Python takes.
    """
    call(*operands[0])  # compiles, and that cannot be captured
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for each in operands:
            call(*each)
    return event_seconds(graph.replay) / len(operands)


def event_seconds(call: Call) -> float:
    """Median seconds of `call` between two events of the GPU, over samples of `MILLISECONDS`."""
    call()
    loops = max(1, math.ceil(MILLISECONDS / 1e3 / elapsed(call)))
    return statistics.median(elapsed(call, loops) for _ in range(SAMPLES))


def elapsed(call: Call, loops: int = 1) -> float:
    """Seconds of one of `loops` calls."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(loops):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / loops


def drawn(*shape: int) -> torch.Tensor:
    """Normal bfloat16 numbers: products of zeros draw less power, and run faster."""
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def measure_ceilings(plan: Plan) -> Iterator[Row]:
    """Bytes a second from memory and from the L2 cache, operations a second of a large product."""
    yield {"ceiling": "memory", "rate": copy_rate(2**32)}
    yield {"ceiling": "L2", "rate": copy_rate(2**23)}
    yield {"ceiling": "bfloat16", "rate": 2 * 8192**3 / graph_seconds(torch.mm, [(drawn(8192, 8192),) * 2])}


def copy_rate(size: int) -> float:
    """Bytes a second, read and written, of copying `size` bytes."""
    source = torch.empty(size, device="cuda", dtype=torch.uint8)
    pair = torch.empty_like(source), source
    repeats = max(1, 2**28 // size)
    return 2 * size / graph_seconds(torch.Tensor.copy_, [pair] * repeats)


def check_kernels(plan: Plan) -> Iterator[Row]:
    """The GPU tests of the package; nothing is timed behind a red one."""
    root = Path(__file__).parents[1]
    command = [sys.executable, "-m", "pytest", "-q", "-k", "cuda", str(root / "tests" / "ops" / "test_triton.py")]
    run = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    if run.returncode:
        raise SystemExit(f"bench_gpu.py: the tests must pass before anything is timed.\n{run.stdout}{run.stderr}")
    yield {"tests": run.stdout.strip().splitlines()[-1]}


class Products:
    """The three products of a layer of random blocks, on more inputs and gradients than the L2 cache holds."""

    def __init__(self, shape: tuple[int, int], side: int, sparsity: float, tokens: int) -> None:
        layer = BlockSparseLinear(shape[1], shape[0], side, sparsity, False, device="cuda", dtype=torch.bfloat16)
        self.shape, self.side, self.tokens, self.capability = shape, side, tokens, torch.cuda.get_device_capability()
        self.index, self.values, self.dense = layer.block_index, layer.values.detach(), layer.to_dense().detach()
        copies = 1 + 3 * torch.cuda.get_device_properties(0).L2_cache_size // (2 * tokens * min(shape))
        self.operands = [(drawn(tokens, shape[1]), drawn(tokens, shape[0])) for _ in range(max(2, copies))]
        self.layout = layer.layout
        group = triton.sample_tile(self.capability, side, torch.bfloat16).group
        self.groups = triton.group_order(self.layout, group)
        self.tile = triton.gather_tile(self.capability, side, torch.bfloat16, tokens)

    def ways(self) -> dict[str, dict[str, Call]]:
        """Product -> how it is computed -> function of input and gradient; the dense one first, then ours."""
        layout, values = self.layout, self.values
        return {
            "output": {
                "dense": lambda input, grad: linear(input, self.dense),
                "triton": lambda input, grad: triton.gather(input, values, layout.by_row, None),
                "densify": lambda input, grad: reference.dds(input, values, layout, None, False),
            },
            "input gradient": {
                "dense": lambda input, grad: grad @ self.dense,
                "triton": lambda input, grad: triton.gather(grad, values, layout.by_column, None),
                "densify": lambda input, grad: reference.dds(grad, values, layout, None, True),
            },
            "values gradient": {
                "dense": lambda input, grad: grad.T @ input,
                "triton": lambda input, grad: triton.sample(grad, input, self.groups, self.side),
                "dense, then sample": lambda input, grad: reference.sdd(grad, input, layout),
            },
        }

    def cache_bytes(self) -> int:
        """What `gather` reads: the input once for each block, and the blocks once for each tile of tokens."""
        entries = self.values.numel()
        return 2 * (self.tokens * entries // self.side + entries * math.ceil(self.tokens / self.tile.tokens))

    def tile_seconds(self) -> dict[triton.GatherTile, float]:
        """The output by the tile of the table, first, and by its neighbours."""
        others = [replace(self.tile, stages=self.tile.stages + more) for more in (-1, 1)]
        others += [replace(self.tile, tokens=size, warps=8 if size == 256 else 4) for size in (64, 128, 256)]
        return {
            tile: graph_seconds(
                lambda input, grad, tile=tile: triton.gather(input, self.values, self.layout.by_row, None, tile),
                self.operands,
            )
            for tile in dict.fromkeys([self.tile, *others])
        }


def points(plan: Plan) -> Iterator[tuple[tuple[int, int], int, float, int]]:
    """Shapes, sides, sparsities and tokens; eight block columns or more."""
    for tokens, shape, side, sparsity in product(plan.tokens, plan.shapes, plan.sides, plan.sparsities):
        if min(shape) // side >= 8:
            yield shape, side, sparsity, tokens


def measure_products(plan: Plan) -> Iterator[Row]:
    """Every product by every means, over the dense product; and once the fastest tile."""
    cache = copy_rate(2**23)
    for shape, side, sparsity, tokens in points(plan):
        products = Products(shape, side, sparsity, tokens)
        where = {"shape": f"{shape[0]}x{shape[1]}", "B": side, "s": sparsity, "tokens": tokens}
        for name, ways in products.ways().items():
            seconds = {way: graph_seconds(call, products.operands) for way, call in ways.items()}
            dense, own, _ = seconds.values()
            row = {**where, "product": name, **{f"{way} us": time * 1e6 for way, time in seconds.items()}}
            row |= {"faster than dense": dense / own, "TFLOP/s": 2 * tokens * products.values.numel() / own / 1e12}
            yield row | ({} if name == "values gradient" else {"of L2 rate": products.cache_bytes() / own / cache})
        if (sparsity, tokens) == (0.9, plan.tokens[-1]):
            times = products.tile_seconds()
            best = min(times, key=times.__getitem__)
            yield {**where, "fastest tile": asdict(best), "over that of the table": times[products.tile] / times[best]}


def measure_layers(plan: Plan) -> Iterator[Row]:
    """Forward and backward of a layer through autograd, by every backend and by the one that is chosen."""
    for shape, side, sparsity, tokens in points(replace(plan, tokens=plan.tokens[-1:])):
        layer = BlockSparseLinear(shape[1], shape[0], side, sparsity, device="cuda", dtype=torch.bfloat16)
        operands = drawn(tokens, shape[1]).requires_grad_(), drawn(tokens, shape[0])
        dense = layer_seconds(layer.to_linear(), *operands)
        ratios = {}
        for backend in BACKENDS.values():
            serves = backend.why_not(operands[0].device, torch.bfloat16, (side, side)) is None
            if serves and backend.name != "reference":
                with use_backend(backend.name):
                    ratios[backend.name] = dense / layer_seconds(layer, *operands)
        chosen = dense / layer_seconds(layer, *operands)
        where = {"shape": f"{shape[0]}x{shape[1]}", "B": side, "s": sparsity, "tokens": tokens}
        ratios |= {"chosen": chosen, "well chosen": chosen >= 0.95 * max(ratios.values())}
        yield {**where, "dense us": dense * 1e6, **ratios}


def layer_seconds(layer: nn.Module, input: torch.Tensor, grad: torch.Tensor) -> float:
    """Of output and all gradients."""
    leaves = [input, *layer.parameters()]
    return event_seconds(lambda: torch.autograd.grad(layer(input), leaves, grad))


def measure_steps(plan: Plan) -> Iterator[Row]:
    """Whole compiled training steps of BERT in bfloat16 autocast, and what a step spends its time on."""
    for preset, sequences in plan.models:
        arms = [Arm("dense", preset), Arm("masked dense", preset, plan.arms[0][0])]
        seconds = []
        for arm in arms + [Arm("sparse", preset, sparsity, side) for sparsity, side in plan.arms]:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            step = training_step(arm, sequences)
            for _ in range(plan.steps // 2):
                step()
            seconds.append(statistics.median(elapsed(step) for _ in range(plan.steps)))
            row = {"model": arm.name, "tokens": f"{sequences}x128", "ms a step": seconds[-1] * 1e3}
            row |= {"faster than dense": seconds[0] / seconds[-1]}
            yield {**row, "peak GB": torch.cuda.max_memory_allocated() / 1e9, **shares(step)}


def training_step(arm: Arm, sequences: int) -> Call:
    """One step on one batch, with the head at masked positions and a fused AdamW."""
    model = build_model(arm, make_config(arm, 30522, 128, None), head=True).cuda().train()
    batch = make_batch(sequences, 128, 30522, torch.device("cuda"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    compiled = torch.compile(model)

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            loss = compiled(**batch).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def shares(step: Call) -> Row:
    """Parts of the GPU's time of one step."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        step()
        torch.cuda.synchronize()
    times = {"our kernels": 0.0, "dense products": 0.0, "rest": 0.0}
    for event in profile.key_averages():
        ours = event.key in ("gather", "sample", "sum_splits")
        dense = any(name in event.key for name in ("gemm", "cutlass", "nvjet", "xmma"))
        times["our kernels" if ours else "dense products" if dense else "rest"] += event.self_device_time_total
    return {kind: time / sum(times.values()) for kind, time in times.items()}


def measure_updates(plan: Plan) -> Iterator[Row]:
    """A topology update of BERT-Base: its time, and that nothing is compiled again."""
    arm = Arm("sparse", "base", 0.9, 32)
    model = build_model(arm, make_config(arm, 30522, 128, None), head=True).cuda()
    optimizer = torch.optim.AdamW([layer.values for layer in sparse_layers(model).values()], lr=1e-3)
    batch = make_batch(8, 128, 30522, torch.device("cuda"))
    updater = TopologyUpdater(model, optimizer, total_steps=plan.steps + 1, num_topology_updates=plan.steps)
    compiled = torch.compile(model)

    def train() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            compiled(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    train()
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    seconds = []
    for number in updater.update_steps:
        seconds.append(elapsed(partial(updater.step, number)))
        train()
    again = torch._dynamo.utils.counters["stats"]["unique_graphs"] - graphs
    yield {"tensors": len(updater.layers), "ms an update": statistics.median(seconds) * 1e3, "compiled again": again}


def print_summary(rows: dict[str, list[Row]]) -> None:
    """One short table last."""
    layers = rows.get("layers", [])
    if layers:
        print("\nfaster than a dense layer, forward and backward, geometric mean over the shapes")
    for side, sparsity in dict.fromkeys((row["B"], row["s"]) for row in layers):
        own = [row for row in layers if (row["B"], row["s"]) == (side, sparsity)]
        means = [f"{name} {statistics.geometric_mean(row[name] for row in own):.2f}" for name in ("triton", "chosen")]
        print(f"B={side:<4} s={sparsity:<5} {'  '.join(means)}")
    for row in rows.get("steps", []):
        print(f"{row['model']:28} {row['tokens']:>8}  {row['ms a step']:8.2f} ms  {row['faster than dense']:.2f}x")


PARTS: dict[str, Callable[[Plan], Iterator[Row]]] = {
    "ceilings": measure_ceilings,
    "correctness": check_kernels,
    "products": measure_products,
    "layers": measure_layers,
    "steps": measure_steps,
    "updates": measure_updates,
}


if __name__ == "__main__":
    main()
