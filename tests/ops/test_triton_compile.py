"""
The GPU kernels compiled for each generation of NVIDIA GPUs, which needs none: no spilled register, shared memory that
the chip has, matrix instructions, and as many buffers as the pipeline has stages.

What is compiled are the launches that `hf_dynsparse.ops.triton` makes. By default a part of them; all, in about a
quarter of an hour:

    DYNSPARSE_COMPILE=all make test ARGS="tests/ops/test_triton_compile.py"
"""

import os
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_dynsparse import BlockLayout
from hf_dynsparse.ops import triton as backend


compiler = pytest.importorskip("triton", reason="needs Triton")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="interprets, and so compiles nothing"),
]

EVERYTHING = os.environ.get("DYNSPARSE_COMPILE") == "all"


@dataclass(frozen=True)
class Chip:
    """Compute capability, KiB of shared memory of one program, and the instruction of its tensor cores in PTX."""

    capability: tuple[int, int]
    shared: int
    instruction: str


# Shared memory: CUDA C++ Programming Guide, technical specifications per compute capability.
CHIPS = {
    "sm_80": Chip((8, 0), 163, "mma.sync"),
    "sm_86": Chip((8, 6), 99, "mma.sync"),
    "sm_89": Chip((8, 9), 99, "mma.sync"),
    "sm_90": Chip((9, 0), 227, "wgmma.mma_async"),
    "sm_100": Chip((10, 0), 227, "tcgen05.mma"),
    "sm_120": Chip((12, 0), 99, "mma.sync"),
}
SIDES = (16, 32, 64, 128)
POINTERS = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.int32: "*i32"}

# Storage and whether TF32 is allowed.
FORMATS = {
    "bfloat16": (torch.bfloat16, False),
    "float16": (torch.float16, False),
    "float32": (torch.float32, False),
    "tf32": (torch.float32, True),
}
PRODUCTS = ("output", "input gradient", "values gradient")
TOKENS = (75, 5000, 16384)  # one for each column of the tables of tiles


@dataclass
class Compiled:
    """What became of one launch."""

    ptx: str
    registers: int
    stack: int  # bytes a thread, where spilled registers go
    shared: int  # bytes
    instructions: set[str]


@dataclass
class Launches:
    """Stands for a kernel, and keeps what it is launched with."""

    kernel: Any
    made: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)

    def __getitem__(self, grid: tuple[int, ...]) -> "Launches":
        return self

    def __call__(self, *arguments: Any, **options: Any) -> None:
        self.made.append((self.kernel, arguments, options))


@pytest.fixture(scope="module", autouse=True)
def _nothing_compiled_before(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


def record(
    chip: Chip, product: str, side: int, dtype: torch.dtype, tokens: int, patch: pytest.MonkeyPatch
) -> list[tuple[Any, tuple[Any, ...], dict[str, Any]]]:
    """The launches of one product of a layer of 3 x 4 blocks on `chip`."""
    from hf_dynsparse.ops import triton_kernels

    patch.setattr(backend, "_capability", lambda device: chip.capability)
    kernels = [Launches(getattr(triton_kernels, name)) for name in ("gather", "sample", "sum_splits")]
    for kernel in kernels:
        patch.setattr(triton_kernels, kernel.kernel.__name__, kernel)
    shape = 3 * side, 4 * side
    input, grad = (torch.empty(tokens, width, dtype=dtype) for width in shape[::-1])
    values, index = torch.empty(5, side, side, dtype=dtype), torch.tensor([9, 0, 11, 3, 8], dtype=torch.int32)
    layout = BlockLayout(index, shape, (side, side))
    if product == "output":
        backend.dds(input, values, layout, torch.empty(shape[0], dtype=dtype), False)
    elif product == "input gradient":
        backend.dds(grad, values, layout, None, True)
    else:
        backend.sdd(grad, input, layout)
    return [launch for kernel in kernels for launch in kernel.made]


def compile_for(
    chip: Chip, kernel: Any, arguments: tuple[Any, ...], options: dict[str, Any], folder: Path
) -> Compiled:
    """Compile one launch as Triton would at run time: by dtypes, and by which addresses and sizes 16 divides."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, attributes = {}, {}, {}
    for place, parameter in enumerate(kernel.params):
        if parameter.is_constexpr:
            signature[parameter.name], constants[parameter.name] = "constexpr", options[parameter.name]
            continue
        value = arguments[place]
        size = value.data_ptr() if torch.is_tensor(value) else value
        signature[parameter.name] = POINTERS[value.dtype] if torch.is_tensor(value) else "i32"
        if size % 16 == 0 and not parameter.do_not_specialize:
            attributes[place,] = [["tt.divisibility", 16]]
    major, minor = chip.capability
    compiled = compiler.compile(
        ASTSource(kernel, signature, constants, attributes),
        target=GPUTarget("cuda", 10 * major + minor, 32),
        options={name: value for name, value in options.items() if name not in constants},
    )
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    command = [compiler.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(cubin)]
    usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    ptx = compiled.asm["ptx"]
    instructions = {name for name in ("mma.sync", "wgmma.mma_async", "tcgen05.mma") if f"{name}." in ptx}
    return Compiled(ptx, registers, stack, compiled.metadata.shared, instructions)


def pipelined_bytes(chip: Chip, kernel: str, options: dict[str, Any], itemsize: int, instruction: str | None) -> int:
    """Bytes of shared memory if every operand has all its buffers."""
    # Instructions that read shared memory themselves keep the buffer that they work on.
    buffers = options["num_stages"] - (instruction not in ("wgmma.mma_async", "tcgen05.mma"))
    side, tokens = options["SIDE"], options["TOKENS"]
    if kernel == "gather":
        return buffers * (tokens + side) * options["DEPTH"] * itemsize
    gathered, lines = options["GROUP"] * side * tokens * itemsize, side * tokens * itemsize
    if instruction == "mma.sync" and itemsize == 2:
        return buffers * gathered + lines  # `grad` passes through registers, to be transposed
    return buffers * (gathered + lines)


def cases() -> Iterator[Any]:
    for chip in CHIPS:
        for form in FORMATS:
            for side in SIDES:
                common = form == "bfloat16" and side in (16, 64)
                rare = form in ("float32", "tf32") and side == 16 and chip in ("sm_80", "sm_90")
                if EVERYTHING or common or rare:
                    yield pytest.param(chip, form, side, id=f"{chip}-{form}-{side}")


@pytest.mark.parametrize(("name", "form", "side"), [*cases()])
def test_kernels_compile_well(
    name: str, form: str, side: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chip, (dtype, tf32) = CHIPS[name], FORMATS[form]
    monkeypatch.setattr(backend, "_precision", lambda: "tf32" if tf32 else "ieee")
    for product in PRODUCTS:
        for tokens in TOKENS if EVERYTHING else TOKENS[-1:]:
            with monkeypatch.context() as patch:
                (kernel, arguments, options), *_ = record(chip, product, side, dtype, tokens, patch)
            compiled = compile_for(chip, kernel, arguments, options, tmp_path)
            check(chip, kernel.__name__, options, dtype.itemsize, form, compiled, (product, tokens))


def check(
    chip: Chip, kernel: str, options: dict[str, Any], itemsize: int, form: str, compiled: Compiled, label: object
) -> None:
    assert compiled.stack == 0, label
    if form == "float32":
        assert not compiled.instructions, label
    elif form == "tf32" and kernel == "sample":
        # Which one depends on the side of a block: the newer ones cannot transpose 32-bit entries.
        assert len(compiled.instructions) == 1, label
    else:
        assert compiled.instructions == {chip.instruction}, label
    instruction = next(iter(compiled.instructions), None)
    expected = pipelined_bytes(chip, kernel, options, itemsize, instruction)
    assert expected <= compiled.shared < expected + 1024, (label, expected / 1024, compiled.shared / 1024)
    assert compiled.shared <= chip.shared * 1024, label
    if kernel == "gather" and form != "tf32":
        # Operands come 16 bytes at a time. A smaller copy would be an id, loaded where it is used; or, in TF32, an
        # operand that is transposed on its way.
        copies = re.findall(r"cp\.async\.\w+\.shared\.global \[[^]]*\], \[[^]]*\], (\w+)", compiled.ptx)
        assert set(copies) == {"0x10"}, label


def test_the_sum_over_splits_compiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for chip in CHIPS.values():
        with monkeypatch.context() as patch:
            _, (kernel, arguments, options) = record(chip, "values gradient", 16, torch.bfloat16, 5000, patch)
        compiled = compile_for(chip, kernel, arguments, options, tmp_path)
        assert kernel.__name__ == "sum_splits"
        assert compiled.stack == 0
        assert compiled.shared <= 4096
