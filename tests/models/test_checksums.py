"""
What is loaded is what was saved, or an error says what is wrong: checksums, and checkpoints damaged in every way.

`PYTHONPATH=. python tests/models/test_checksums.py 2000` damages more of them than the 160 of the whole suite.
"""

import json
import logging
import os
import random
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForMaskedLM, BertForMaskedLM, RobertaConfig, RobertaForMaskedLM
from transformers.utils import logging as transformers_logging

from hf_dynsparse import (
    DynSparseBertForMaskedLM,
    DynSparseBertForSequenceClassification,
    prepare_qat_,
    sparse_layers,
    sparsify_,
    to_int8_,
)
from hf_dynsparse.checkpoints.saved_run import SavedRun
from hf_dynsparse.models.checksums import CHECKSUMS, open_weights, with_checksums
from tests.toy import toy_batch, toy_config, toy_model


CASES, SEED = 160, 1
ROOM = 1 << 29  # bytes beside what the process has before the first damaged checkpoint
SECONDS = 20  # for one of them

QUERY = "bert.encoder.layer.1.attention.self.query"


def test_damaged_checkpoints() -> None:
    """In a process of its own, short of memory: neither a crash nor a hang may go unnoticed."""
    command = [sys.executable, __file__, str(CASES)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment)
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout)
    print(counts)  # noqa: T201
    assert sum(sum(kind.values()) for kind in counts.values()) == CASES
    assert not [kind for kind in counts.values() if "wrong" in kind], done.stderr
    for kind in counts.keys() - {"header bits", "header edits", "config edits"}:
        assert "equal" not in counts[kind]


def checksums_of(folder: Path) -> tuple[dict[str, str], set[str]]:
    """The checksums by name, and the names of the tensors, in all files of a folder."""
    listed, held = {}, set()
    for file in folder.glob("*.safetensors"):
        with open_weights(file) as weights:
            listed |= dict(pair.split(":") for pair in weights.metadata()[CHECKSUMS].split())
            held |= set(weights.keys())
    return listed, held


def roberta(**sizes: Any) -> Any:
    defaults = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 1}
    config = RobertaConfig(**{**defaults, "vocab_size": 64, "max_position_embeddings": 34, **sizes})
    return sparsify_(RobertaForMaskedLM(config), block_size=4, sparsity=0.75)


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (toy_model, {}),
        (toy_model, {"max_shard_size": "10KB"}),
        (lambda: toy_model().to(torch.bfloat16), {}),
        (lambda: toy_model(sparsity=0.0), {}),
        (roberta, {}),
        (roberta, {"max_shard_size": "10KB"}),
        (lambda: roberta(tie_word_embeddings=False), {}),
    ],
)
def test_every_tensor_has_a_checksum(tmp_path: Path, make: Callable[[], Any], options: dict[str, Any]) -> None:
    model = make()
    model.save_pretrained(tmp_path / "once", **options)
    listed, held = checksums_of(tmp_path / "once")
    assert listed.keys() == held
    loaded = type(model).from_pretrained(tmp_path / "once", dtype="auto")
    loaded.save_pretrained(tmp_path / "twice", **options)
    assert checksums_of(tmp_path / "twice") == (listed, held)


def test_equal_models_give_equal_files(tmp_path: Path) -> None:
    """Five times, for the order in which safetensors writes metadata is random."""
    folders = [tmp_path / str(number) for number in range(5)]
    for folder in folders:
        toy_model(num_hidden_layers=1).save_pretrained(folder)
    assert len({(folder / "model.safetensors").read_bytes() for folder in folders}) == 1


@pytest.mark.parametrize("stock", [False, True])
def test_a_given_state_is_what_gets_checksums(tmp_path: Path, stock: bool) -> None:
    model, other = toy_model(), toy_model(seed=1)
    if stock:
        model, other = (sparsify_(each.to_dense(), block_size=4, sparsity=0.75) for each in (model, other))
    quantizer = getattr(model, "hf_quantizer", None)
    model.save_pretrained(tmp_path, state_dict=other.state_dict())
    assert getattr(model, "hf_quantizer", None) is quantizer
    SavedRun(tmp_path).check_weights()
    loaded = type(model).from_pretrained(tmp_path).state_dict()
    for name, tensor in other.state_dict().items():
        assert torch.equal(loaded[name], tensor)
    model.save_pretrained(tmp_path / "own")
    assert torch.equal(load_file(tmp_path / "own" / "model.safetensors")[f"{QUERY}.values"], values_of(model))


def values_of(model: Any) -> torch.Tensor:
    return sparse_layers(model)[QUERY].values.detach()


def test_another_save_in_the_folder_keeps_its_metadata(tmp_path: Path) -> None:
    dense = toy_model(sparsity=0.0).to_dense()
    dense.save_pretrained(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    toy_model().save_pretrained(tmp_path, variant="sparse", max_shard_size="20KB")
    assert (tmp_path / "model.safetensors").read_bytes() == before
    shards = sorted(tmp_path.glob("model.sparse-*.safetensors"))
    assert len(shards) > 1
    for file in shards:
        with open_weights(file) as weights:
            assert set(weights.metadata()) == {"format", CHECKSUMS}
    loaded = DynSparseBertForMaskedLM.from_pretrained(tmp_path, variant="sparse")
    assert torch.equal(values_of(loaded), values_of(toy_model()))


def test_weights_elsewhere_have_no_checksums() -> None:
    state = {"cls.predictions.bias": torch.empty(64, device="meta")}
    assert with_checksums(toy_model(), state) == (state, {})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    toy_model().save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (DynSparseBertForMaskedLM, {"dtype": torch.bfloat16}),
        (DynSparseBertForMaskedLM, {"device_map": "cpu"}),
        (DynSparseBertForSequenceClassification, {"num_labels": 3}),
    ],
)
def test_one_bit_is_noticed_however_it_is_loaded(folder: Path, cls: Any, options: dict[str, Any]) -> None:
    file = folder / "model.safetensors"
    cls.from_pretrained(folder, **options)
    with open_weights(file) as weights:
        bits = weights.get_tensor(f"{QUERY}.values").numpy().tobytes()
    place = file.read_bytes().index(bits)
    content = bytearray(file.read_bytes())
    content[place + 100] ^= 1  # the last bit of a number, which nobody would see
    file.write_bytes(content)
    message = f"`{QUERY}.values` must be as it was saved, .* in {re.escape(str(file))}. It is damaged"
    with pytest.raises(ValueError, match=message):
        cls.from_pretrained(folder, **options)


def test_a_dense_checkpoint_needs_none(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    BertForMaskedLM(toy_config().to_stock()).save_pretrained(tmp_path)
    DynSparseBertForMaskedLM.from_pretrained(tmp_path, sparsity=0.75, block_size=4)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("make", [toy_model, roberta])
def test_what_is_not_finite_loads_with_a_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, make: Callable[[], Any]
) -> None:
    model = make()
    name, layer = next(iter(sparse_layers(model).items()))
    with torch.no_grad():
        layer.values[0, 0, 0] = float("nan")
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert f"`{name}.values` in {tmp_path}" in caplog.text
    assert loaded.get_submodule(name).values.isnan().sum() == 1


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return open, (str(self.file), "w")


@pytest.mark.parametrize("make", [toy_model, roberta])
@pytest.mark.parametrize("options", [{}, {"weights_only": False}, {"use_safetensors": False}])
def test_a_pickle_is_not_read(tmp_path: Path, make: Callable[[], Any], options: dict[str, Any]) -> None:
    model, ran = make(), tmp_path / "ran"
    model.save_pretrained(tmp_path)
    torch.save({"a": Payload(ran)}, tmp_path / "pytorch_model.bin")
    if not options:
        type(model).from_pretrained(tmp_path)  # from the file beside it
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=f"safetensors.*{re.escape(str(tmp_path / 'pytorch_model.bin'))}"):
        type(model).from_pretrained(tmp_path, **options)
    with pytest.raises(ValueError, match="must be safetensors. Got .*pytorch_model.bin, a pickle"):
        SavedRun(tmp_path).check_weights()
    assert not ran.exists()


def test_a_pickle_by_its_own_name(tmp_path: Path) -> None:
    torch.save({"a": Payload(tmp_path / "ran")}, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match="unpickling can run"):
        DynSparseBertForMaskedLM.from_pretrained(tmp_path / "weights.pt", config=toy_config(), weights_only=False)
    assert not (tmp_path / "ran").exists()


# Each damage changes one thing in a folder, beside which there is another save of the same shapes. `True`: no such
# checkpoint may load; else it may if it is equal.


def flip_data_bits(folder: Path, other: Path, draw: random.Random) -> bool:
    file, content, start = read_weights(folder, draw)
    flip(content, range(start, len(content)), draw.choice((1, 1, 2, 8)), draw)
    file.write_bytes(content)
    return True


def flip_header_bits(folder: Path, other: Path, draw: random.Random) -> bool:
    file, content, start = read_weights(folder, draw)
    flip(content, range(start), draw.choice((1, 1, 2, 3)), draw)
    file.write_bytes(content)
    return False


def truncate(folder: Path, other: Path, draw: random.Random) -> bool:
    file, content, start = read_weights(folder, draw)
    keep = draw.choice((0, 4, 8, start // 2, start, len(content) - 1, draw.randrange(len(content))))
    file.write_bytes(content[:keep] if draw.random() < 0.9 else content + draw.randbytes(16))
    return True


def edit_header(folder: Path, other: Path, draw: random.Random) -> bool:
    file, content, start = read_weights(folder, draw)
    header = json.loads(content[8:start])
    name, second = draw.choices([name for name in header if name != "__metadata__"], k=2)
    entry = header[name]
    edit = draw.choice(sorted(HEADER_EDITS))
    before = json.dumps(header, sort_keys=True)
    HEADER_EDITS[edit](header, entry, name, second)
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + content[start:])
    return edit not in HARMLESS and json.dumps(header, sort_keys=True) != before


HEADER_EDITS: dict[str, Callable[..., Any]] = {
    "dtype": lambda header, entry, *_: entry.update(dtype={"F32": "I32", "I32": "F32"}.get(entry["dtype"], "U8")),
    "narrow dtype": lambda header, entry, *_: entry.update(
        dtype={"F32": "BF16", "I32": "I16"}.get(entry["dtype"], "U8"), shape=[*entry["shape"], 2]
    ),
    "unknown dtype": lambda header, entry, *_: entry.update(dtype="F33"),
    "shape": lambda header, entry, *_: entry.update(shape=[1, *entry["shape"]]),
    "huge shape": lambda header, entry, *_: entry.update(shape=[2**40]),
    "overflowing shape": lambda header, entry, *_: entry.update(shape=[2**33, 2**33]),
    "negative shape": lambda header, entry, *_: entry.update(shape=[-1]),
    "empty and huge": lambda header, entry, *_: entry.update(shape=[0, 2**62, 2**62]),
    "offsets": lambda header, entry, name, second: entry.update(data_offsets=header[second]["data_offsets"]),
    "huge offsets": lambda header, entry, *_: entry.update(data_offsets=[0, 2**62]),
    "swapped names": lambda header, entry, name, second: header.update({name: header[second], second: entry}),
    "other name": lambda header, entry, name, second: header.update({f"{name}x": header.pop(name)}),
    "lost": lambda header, entry, name, second: header.pop(name),
    "no checksums": lambda header, *_: header.pop("__metadata__"),
    "other metadata": lambda header, *_: header["__metadata__"].update(author="me"),
    "other checksums": lambda header, *_: header["__metadata__"].update({CHECKSUMS: "a:b :: c"}),
}


# Two biases of zeros may swap their names.
HARMLESS = ("no checksums", "other metadata", "swapped names")


def edit_index(folder: Path, other: Path, draw: random.Random) -> bool:
    """With the right checksum: it is for the check of the layout to refuse it."""
    rewrite(folder, draw, ".block_index", draw.choice(INDEX_EDITS))
    return True


INDEX_EDITS: tuple[Callable[[torch.Tensor], torch.Tensor], ...] = (
    lambda index: index.index_fill(0, torch.tensor([1]), -1),
    lambda index: index.index_fill(0, torch.tensor([2]), 1 << 20),
    lambda index: index.index_fill(0, torch.tensor([0]), -(1 << 31)),
    lambda index: index.index_fill(0, torch.tensor([0, 3]), int(index[1])),
    lambda index: index.long() + (1 << 32),
    lambda index: index.float(),
    lambda index: index[:-1].clone(),
    lambda index: index[:, None].clone(),
    lambda index: torch.empty(0, dtype=torch.int32),
)


def edit_values(folder: Path, other: Path, draw: random.Random) -> bool:
    """With the right checksum too."""
    rewrite(folder, draw, ".values", draw.choice(VALUE_EDITS))
    return True


VALUE_EDITS: tuple[Callable[[torch.Tensor], torch.Tensor], ...] = (
    lambda values: values.to(torch.int8),
    lambda values: values.to(torch.bool),
    lambda values: values.view(torch.int32),
    lambda values: values[1:].clone(),
    lambda values: values.flatten(),
    lambda values: torch.empty(0),
)


def edit_config(folder: Path, other: Path, draw: random.Random) -> bool:
    file = folder / "config.json"
    config = json.loads(file.read_text())
    sparse = config.get("quantization_config", config)
    bert = config["model_type"] == "dynsparse_bert"  # ours to protect
    layer = next(iter(sparse["nnzb"] or {"layer.0.output.dense": 0}))
    edits: tuple[Callable[[], Any], ...] = (
        lambda: config.update(hidden_size=draw.choice((0, -1, 31, 10**9, 10**12, 2**63, 1e300, "wide"))),
        lambda: config.update(intermediate_size=draw.choice((1, 128, 10**9, 2**62, None))),
        lambda: config.update(vocab_size=draw.choice((1, 63, 10**12, 2**64))),
        lambda: config.update(max_position_embeddings=draw.choice((1, 10**12, -5))),
        lambda: config.update(num_hidden_layers=draw.choice((0, 2, -1, 1.5, bert * 10**9))),
        lambda: sparse.update(block_size=draw.choice((0, 1, 2, 8, [2, 8], [4, 4, 4], 10**9, "4"))),
        lambda: sparse.update(sparsity=draw.choice((-1, 0.0, 0.5, 0.9, 1.0, 1e300, "much"))),
        lambda: sparse.update(nnzb=draw.choice(({layer: 3}, {layer: 10**12}, {layer: -1}, {"nowhere": 1}, {}, None))),
        lambda: config.update(num_labels=draw.choice((3, -1, bert * 10**10))),
        lambda: config.update(tie_word_embeddings=False),
        lambda: config.update(model_type=draw.choice(("gpt2", "nothing"))),
        lambda: config.pop(draw.choice(sorted(config))),
    )
    if draw.random() < 0.5:
        draw.choice(edits)()
        file.write_text(json.dumps(config))
    else:
        content = bytearray(file.read_bytes())
        flip(content, range(len(content)), 1, draw)
        file.write_bytes(content)
    return False


def mix_up(folder: Path, other: Path, draw: random.Random) -> bool:
    """A file of another save of the same model, or none."""
    files = sorted(folder.glob("*.safetensors"))
    file = draw.choice(files)
    if len(files) > 1 and draw.random() < 0.5:
        shutil.copy(other / file.name, file)
    else:
        file.unlink()
    return True


DAMAGES = {
    "data bits": flip_data_bits,
    "header bits": flip_header_bits,
    "truncation": truncate,
    "header edits": edit_header,
    "index edits": edit_index,
    "value edits": edit_values,
    "config edits": edit_config,
    "mix-ups": mix_up,
}


# These look for what an int8 model does not have.
OF_FLOATS = ("index", "value", "config")


def flip(content: bytearray, places: range, count: int, draw: random.Random) -> None:
    for _ in range(count):
        content[draw.choice(places)] ^= 1 << draw.randrange(8)


def read_weights(folder: Path, draw: random.Random) -> tuple[Path, bytearray, int]:
    """A weight file, its bytes, and where its data start."""
    file = draw.choice(sorted(folder.glob("*.safetensors")))
    content = bytearray(file.read_bytes())
    return file, content, 8 + struct.unpack("<Q", content[:8])[0]


def rewrite(folder: Path, draw: random.Random, leaf: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Change one tensor of a name that ends in `leaf`, and the checksums in all files with it."""
    weights = {file: load_file(file) for file in sorted(folder.glob("*.safetensors"))}
    file, name = draw.choice([(file, name) for file in weights for name in weights[file] if name.endswith(leaf)])
    weights[file][name] = change(weights[file][name])
    everything = {name: tensor for tensors in weights.values() for name, tensor in tensors.items()}
    _, metadata = with_checksums(toy_model(), everything)
    for file, tensors in weights.items():
        save_file(tensors, file, metadata={"format": "pt", **metadata})


def save_originals(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Checkpoints to be damaged and what they hold, each with another save of the same shapes beside it."""
    held = {}
    for name, make, shard in (
        ("bert", lambda seed: toy_model(seed, num_hidden_layers=1), "50GB"),
        ("sharded", lambda seed: toy_model(seed, num_hidden_layers=1), "8KB"),
        ("roberta", lambda seed: roberta(), "50GB"),
        ("slimmed", lambda seed: toy_model(seed, heads_per_layer=[1, 2], intermediate_sizes=[16, 64]), "50GB"),
        ("int8", int8_model, "8KB"),
    ):
        for seed, path in enumerate((folder / name, folder / f"{name}-other")):
            model = make(seed)
            model.save_pretrained(path, max_shard_size=shard)
            held.setdefault(name, model.state_dict())
    return held


def int8_model(seed: int) -> Any:
    model = prepare_qat_(toy_model(seed, num_hidden_layers=1))
    model.train()(**toy_batch())
    return to_int8_(model)


def fuzz(cases: int) -> dict[str, Counter[str]]:
    """Damage `cases` checkpoints one after another, and count what became of those of each kind."""
    counts: dict[str, Counter[str]] = {kind: Counter() for kind in DAMAGES}
    with tempfile.TemporaryDirectory() as folder:
        originals = Path(folder, "originals")
        held = save_originals(originals)
        limit = vm_size() + ROOM
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        for case in range(cases):
            draw = random.Random(f"{SEED}/{case}")
            kind = list(DAMAGES)[case % len(DAMAGES)]
            name = draw.choice([name for name in sorted(held) if name != "int8" or not kind.startswith(OF_FLOATS)])
            path = shutil.copytree(originals / name, Path(folder, f"case-{case}"))
            must_be_refused = DAMAGES[kind](path, originals / f"{name}-other", draw)
            signal.alarm(SECONDS)
            outcome = load(path, held[name], kind, must_be_refused)
            signal.alarm(0)
            if outcome not in ("equal", "refused"):
                print(f"case {case}, {kind} of {name}: {outcome}", file=sys.stderr)  # noqa: T201
                outcome = "wrong"
            counts[kind][outcome] += 1
            shutil.rmtree(path)
    return counts


def load(path: Path, held: dict[str, torch.Tensor], kind: str, must_be_refused: bool) -> str:
    """What became of a checkpoint: `"equal"`, `"refused"`, or what is wrong about it."""
    try:
        loaded = AutoModelForMaskedLM.from_pretrained(path).state_dict()
    except Exception as error:
        # Configurations are transformers' own, and its errors for nonsense in them are of all types.
        named = str(path) in str(error) or any(f"`{name}`" in str(error) for name in held)
        if (isinstance(error, ValueError | OSError) and named) or (
            kind == "config edits" and not isinstance(error, MemoryError)
        ):
            return "refused"
        return f"no reason: {error!r}"
    if loaded.keys() != held.keys() or not all(torch.equal(loaded[name], held[name]) for name in held):
        return "other weights"
    return "must not load" if must_be_refused else "equal"


def vm_size() -> int:
    """Bytes of address space of this process."""
    pages, *_ = Path("/proc/self/statm").read_text().split()
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    print(json.dumps(fuzz(int(sys.argv[1]))))  # noqa: T201
