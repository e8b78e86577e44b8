"""One table of damages over every kind of checkpoint: each is refused by one line that names tensor and file."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaForSequenceClassification,
)

from hf_dynsparse import prepare_qat_, sparsify_, to_int8_
from hf_dynsparse.hub.files import check_model
from tests.toy import toy_batch, toy_model


SIZES: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
ROBERTA: dict[str, Any] = {**SIZES, "num_attention_heads": 2, "max_position_embeddings": 40, "pad_token_id": 1}
GPT2 = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 40, "bos_token_id": 1}
HOW: dict[str, Any] = {"block_size": 4, "sparsity": 0.75}
SLIM = {"num_attention_heads": 4, "heads_per_layer": [1, 4], "intermediate_sizes": [12, 64]}


def int8(model: Any, embeddings: bool = False) -> Any:
    prepare_qat_(model, embeddings)
    batch = toy_batch()
    labels = torch.tensor([0, 1, 0, 1]) if "Classification" in type(model).__name__ else batch["labels"]
    model.train()(batch["input_ids"], labels=labels)
    return to_int8_(model)


class Kind(NamedTuple):
    """A kind of model, its class and names of tensors; `layer` has 16 of 64 blocks of 4 x 4."""

    build: Callable[[], Any]
    auto: Any
    layer: str
    words: str
    norm: str
    head: str


LAYER = "encoder.layer.1.attention.self.query"
WORDS, NORM = "embeddings.word_embeddings.weight", "encoder.layer.0.output.LayerNorm.bias"
BERT = f"bert.{LAYER}", f"bert.{WORDS}", f"bert.{NORM}", "cls.predictions.transform.dense.weight"
OF_ROBERTA = f"roberta.{LAYER}", f"roberta.{WORDS}", f"roberta.{NORM}"
KINDS = {
    "bert": Kind(toy_model, AutoModelForMaskedLM, *BERT),
    "slimmed": Kind(lambda: toy_model(**SLIM), AutoModelForMaskedLM, *BERT),
    "stock": Kind(
        lambda: sparsify_(RobertaForMaskedLM(RobertaConfig(**ROBERTA)), **HOW),
        AutoModelForMaskedLM,
        *OF_ROBERTA,
        "lm_head.dense.bias",
    ),
    "gpt2": Kind(  # stored transposed where dense; its head is tied to the words
        lambda: sparsify_(GPT2LMHeadModel(GPT2Config(**GPT2)), **HOW),
        AutoModelForCausalLM,
        "transformer.h.1.attn.c_proj",
        "transformer.wte.weight",
        "transformer.ln_f.bias",
        "",
    ),
    "int8 bert": Kind(lambda: int8(toy_model()), AutoModelForMaskedLM, *BERT[:3], "cls.predictions.bias"),
    "int8 stock": Kind(
        lambda: int8(sparsify_(RobertaForSequenceClassification(RobertaConfig(**ROBERTA)), **HOW), embeddings=True),
        AutoModelForSequenceClassification,
        OF_ROBERTA[0],
        "roberta.embeddings.word_embeddings.int8_values",
        OF_ROBERTA[2],
        "classifier.out_proj.scale",
    ),
}
OURS, STOCK, INT8 = ("bert", "slimmed"), ("stock", "gpt2"), ("int8 bert", "int8 stock")
FLOATS = (*OURS, *STOCK)

Tensors = dict[str, torch.Tensor]
Change = Callable[[Tensors, dict[str, Any], Kind], Any]


class Damage(NamedTuple):
    """What is changed in tensors and config.json, what the error says, and for which kinds."""

    change: Change
    message: str
    kinds: tuple[str, ...] = tuple(KINDS)


def drop(name: str) -> Change:
    return lambda tensors, config, kind: tensors.pop(name.format(**kind._asdict()))


def edit(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    def apply(tensors: Tensors, config: dict[str, Any], kind: Kind) -> None:
        key = name.format(**kind._asdict())
        tensors[key] = change(tensors[key]).contiguous()

    return apply


def put(name: str, place: int, value: float) -> Change:
    return edit(name, lambda tensor: tensor.index_fill(0, torch.tensor([place]), value))


def describe(**changes: Any) -> Change:
    return lambda tensors, config, kind: config.update(changes)


def describe_sparsity(**changes: Any) -> Change:
    return lambda tensors, config, kind: config["quantization_config"].update(changes)


def describe_layer(**changes: Any) -> Change:
    return lambda tensors, config, kind: config["quantization_config"]["layers"][kind.layer].update(changes)


def count(name: str, blocks: int) -> Change:
    def apply(tensors: Tensors, config: dict[str, Any], kind: Kind) -> None:
        config["quantization_config"]["nnzb"][name.format(**kind._asdict())] = blocks

    return apply


WITHOUT = "A checkpoint must hold every tensor of the .* Got {place} without "
SHAPE = r"must have shape \({}\) by the configuration. Got \({}\) in "
DAMAGES = {
    # Tensors that are not there.
    "no words": Damage(drop("{words}"), WITHOUT + "`{words}`"),
    "no norm": Damage(drop("{norm}"), WITHOUT + "`{norm}`"),
    "no head": Damage(drop("{head}"), WITHOUT + "`{head}`", tuple(kind for kind in KINDS if kind != "gpt2")),
    "no values": Damage(drop("{layer}.values"), WITHOUT + "`{layer}.values`", FLOATS),
    "no index": Damage(drop("{layer}.block_index"), WITHOUT + "`{layer}.block_index`", FLOATS),
    "no bias": Damage(drop("{layer}.bias"), WITHOUT + "`{layer}.bias`", FLOATS),
    "no int8 values": Damage(drop("{layer}.int8_values"), WITHOUT + "`{layer}.int8_values`", INT8),
    "no scale": Damage(drop("{layer}.input_scale"), WITHOUT + "`{layer}.input_scale`", INT8),
    "no code": Damage(drop("{layer}.block_code"), WITHOUT + "`{layer}.block_code`", INT8),
    "nothing": Damage(lambda tensors, config, kind: tensors.clear(), "with none of .*: it holds nothing", OURS),
    # Other shapes.
    "fewer values": Damage(
        edit("{layer}.values", lambda x: x[:-1]), "`{layer}.values` " + SHAPE.format("16, 4, 4", "15, 4, 4"), FLOATS
    ),
    "other blocks": Damage(
        edit("{layer}.values", lambda x: x.view(16, 2, 8)),
        "`{layer}.values` " + SHAPE.format("16, 4, 4", "16, 2, 8"),
        FLOATS,
    ),
    "a longer index": Damage(
        edit("{layer}.block_index", lambda x: torch.arange(17, dtype=torch.int32)),
        "`{layer}.block_index` " + SHAPE.format("16,", "17,"),
        FLOATS,
    ),
    "fewer int8 values": Damage(
        edit("{layer}.int8_values", lambda x: x[1:]),
        "`{layer}.int8_values` " + SHAPE.format("16, 4, 4", "15, 4, 4"),
        INT8,
    ),
    "other words": Damage(edit("{words}", lambda x: x[:, 1:]), "`{words}` " + SHAPE.format("64, 32", "64, 31"), OURS),
    # Other numbers: what no shape tells. There are no checksums beside them.
    "an index out of range": Damage(
        put("{layer}.block_index", 3, 64),
        r"`block_index` of `{layer}` in {place} must lie in \[0, 64\). Got 64",
        FLOATS,
    ),
    "a negative index": Damage(put("{layer}.block_index", 3, -1), r"must lie in \[0, 64\). Got -1 in slot 3", FLOATS),
    "a block twice": Damage(
        edit("{layer}.block_index", lambda x: x.index_copy(0, torch.tensor([3]), x[5:6])),
        "`block_index` of `{layer}` in {place} must name each block once. Got",
        FLOATS,
    ),
    "another code": Damage(
        edit("{layer}.block_code", torch.zeros_like), "`block_code` of `{layer}` in .* must hold 16 block ids", INT8
    ),
    "a scale of NaN": Damage(
        edit("{layer}.scale", lambda x: x * torch.nan), "`{layer}.scale` must be positive and finite. Got nan in", INT8
    ),
    "an infinite scale of an embedding": Damage(
        edit("roberta.embeddings.word_embeddings.scale", lambda x: x * torch.inf), "Got inf in", ("int8 stock",)
    ),
    "a negative scale": Damage(
        edit("{layer}.input_scale", torch.neg), "`{layer}.input_scale` must be positive and finite. Got -", INT8
    ),
    # Other dtypes, which the loader would cast.
    "an index of int64": Damage(
        edit("{layer}.block_index", torch.Tensor.long),
        "`{layer}.block_index` must be of dtype torch.int32. Got",
        FLOATS,
    ),
    "an index of floats": Damage(
        edit("{layer}.block_index", torch.Tensor.float), "`{layer}.block_index` must be of dtype torch.int32", FLOATS
    ),
    "values of int8": Damage(
        edit("{layer}.values", torch.Tensor.char), "`{layer}.values` must be of dtype floating point. Got", FLOATS
    ),
    "words of booleans": Damage(
        edit("{words}", torch.Tensor.bool), "`{words}` must be of dtype floating point", FLOATS
    ),
    "int8 values of floats": Damage(
        edit("{layer}.int8_values", torch.Tensor.float), "`{layer}.int8_values` must be of dtype torch.int8", INT8
    ),
    # A configuration of another model.
    "fewer layers": Damage(
        describe(num_hidden_layers=1, n_layer=1),
        r"a place for every sparse layer of a checkpoint. Got `\S+\.1\.",
        ("bert", *STOCK, *INT8),
    ),
    "more layers": Damage(describe(num_hidden_layers=3), r"without `\S+\.2\..* and .* more", ("bert", "stock", *INT8)),
    "another sparsity": Damage(describe(sparsity=0.5), SHAPE.format("32, 4, 4", "16, 4, 4"), ("bert",)),
    "no sparsity": Damage(describe(sparsity=0.0), r"without `\S+\.query.weight`.*`sparsity` and `nnzb`", OURS),
    "another block size": Damage(describe(block_size=2), SHAPE.format("64, 2, 2", "16, 4, 4"), ("bert",)),
    "another number of blocks": Damage(
        describe(nnzb={"layer.0.attention.self.query": 3}), SHAPE.format("3, 4, 4", "16, 4, 4"), ("bert",)
    ),
    "another block size of a stock model": Damage(
        describe_sparsity(block_size=2), SHAPE.format("16, 2, 2", "16, 4, 4"), ("stock",)
    ),
    "a block that does not fit": Damage(describe_sparsity(block_size=5), "must divide both sides of `", ("stock",)),
    "more blocks than there are": Damage(
        count("{layer}", 65), r"`nnzb` of `{layer}` must lie in \[1, 64\]. Got 65", STOCK
    ),
    "a module that is not linear": Damage(
        count("roberta.embeddings", 1), "must name linear layers. Got `(roberta.)?embeddings`, which is", ("stock",)
    ),
    "layers of something else": Damage(
        describe_sparsity(nnzb={"mlp": 4}), "must name layers of Roberta.*. Got none in {place}", ("stock",)
    ),
    "dense weights": Damage(
        lambda tensors, config, kind: [tensors.pop(name) for name in list(tensors) if ".values" in name],
        r"without `\S+.values` and .*, and remove `quantization_config`",
        ("stock",),
    ),
    "another number of heads": Damage(
        describe(heads_per_layer=[2, 4]), SHAPE.format("8, 4, 4", "4, 4, 4"), ("slimmed",)
    ),
    "layers of one size": Damage(describe(heads_per_layer=None), SHAPE.format("16, 4, 4", "4, 4, 4"), ("slimmed",)),
    "other neurons": Damage(
        describe(intermediate_sizes=None), r"must have shape \(64,\) .* Got \(12,\)", ("slimmed",)
    ),
    "a tied head": Damage(describe(tie_word_embeddings=False), r"without `cls.predictions.decoder.", OURS),
    "fewer int8 blocks": Damage(describe_layer(nnzb=7), r"must have shape \(7, 4, 4\)", INT8),
    "no bits": Damage(
        lambda _, config, kind: config["quantization_config"]["layers"][kind.layer].pop("bits"),
        "must give block, nnzb",
        INT8,
    ),
    "bits of no code": Damage(describe_layer(bits=3), "bits one of 1, 2, 4, 8. Got .*'bits': 3", INT8),
}
CASES = [(kind, name) for name, damage in DAMAGES.items() for kind in damage.kinds]
# Names of what is wrong in config.json itself: there is no file of weights to name.
IN_CONFIG = ("a block that", "more blocks than", "a module that", "no bits", "bits of no")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A sound checkpoint of each kind. Not to be changed."""
    folder = tmp_path_factory.mktemp("saved")
    for name, kind in KINDS.items():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            kind.build().save_pretrained(folder / name)
    return {name: folder / name for name in KINDS}


def damaged(folder: Path, target: Path, change: Change, kind: Kind, checksums: bool = False) -> Path:
    shutil.copytree(folder, target)
    config, file = json.loads((target / "config.json").read_text()), target / "model.safetensors"
    with safe_open(file, framework="pt") as weights:
        metadata = weights.metadata() if checksums else {"format": "pt"}
    tensors = load_file(file)
    change(tensors, config, kind)
    save_file(tensors, file, metadata)
    (target / "config.json").write_text(json.dumps(config))
    return target


def refused(load: Callable[[], Any], message: str, folder: Path | None) -> None:
    """By one `ValueError` of one line that names the folder."""
    with pytest.raises(ValueError, match=message) as caught:
        load()
    assert "\n" not in str(caught.value)
    assert folder is None or str(folder) in str(caught.value)


def expected(message: str, kind: Kind, place: Path) -> str:
    """The message for a kind of model; a bare model or another head has no prefix before its names."""
    for name in ("layer", "words", "norm", "head"):
        prefix, _, inner = getattr(kind, name).partition(".")
        full = re.escape(inner) if name == "head" else rf"(?:{prefix}\.)?{re.escape(inner)}"
        message = message.replace(f"{{{name}}}", rf"{prefix}\.{full}" if name == "head" else full)
    return message.replace("{place}", rf"{re.escape(str(place))}\S*")


@pytest.mark.parametrize(("name", "case"), CASES)
def test_a_damaged_checkpoint_is_refused(name: str, case: str, saved: dict[str, Path], tmp_path: Path) -> None:
    """With its own head and, in turns, with none, with another, or where it is looked at before a push."""
    kind, damage = KINDS[name], DAMAGES[case]
    folder = damaged(saved[name], tmp_path / "model", damage.change, kind)
    message, place = expected(damage.message, kind, folder), None if case.startswith(IN_CONFIG) else folder
    refused(lambda: kind.auto.from_pretrained(folder), message, place)
    others: list[Callable[[], Any]] = [lambda: check_model(folder)]
    if case in ("no head", "a tied head"):
        AutoModel.from_pretrained(folder)  # without the head
    else:
        others += [lambda: AutoModel.from_pretrained(folder)]
        others += [lambda: kind.auto.from_pretrained(folder, ignore_mismatched_sizes=True)]
        if name in FLOATS:
            others += [lambda: AutoModelForSequenceClassification.from_pretrained(folder)]
    refused(others[CASES.index((name, case)) % len(others)], message, place)


@pytest.mark.parametrize("name", KINDS)
def test_with_checksums_nothing_may_change(name: str, saved: dict[str, Path], tmp_path: Path) -> None:
    kind = KINDS[name]
    leaf = "int8_values" if name in INT8 else "values"

    def flip(tensors: Tensors, config: dict[str, Any], kind: Kind) -> None:
        tensors[f"{kind.layer}.{leaf}"].view(-1).view(torch.uint8)[5] ^= 1  # which nobody would see

    flipped = damaged(saved[name], tmp_path / "flipped", flip, kind, checksums=True)
    message = rf"`{re.escape(kind.layer)}.{leaf}` must be as it was saved, .*model.safetensors. It is damaged"
    for load in (kind.auto.from_pretrained, AutoModel.from_pretrained, check_model):
        refused(lambda load=load: load(flipped), message, flipped)
    lost = damaged(saved[name], tmp_path / "lost", drop("{words}"), kind, checksums=True)
    refused(lambda: kind.auto.from_pretrained(lost), "without `", lost)


@pytest.mark.parametrize("name", KINDS)
def test_a_whole_checkpoint_loads_with_any_head(
    name: str, saved: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Without checksums, as other tools write it, with a line in the log."""
    kind = KINDS[name]
    bare = damaged(saved[name], tmp_path / "bare", lambda *_: None, kind)
    for folder in (saved[name], bare):
        caplog.clear()
        model = kind.auto.from_pretrained(folder)
        assert (f"{folder / 'model.safetensors'} carries no checksums" in caplog.text) == (folder == bare)
        AutoModel.from_pretrained(folder)
    AutoModelForSequenceClassification.from_pretrained(bare)
    assert type(check_model(bare)) is type(model)


@pytest.mark.parametrize("name", KINDS)
def test_a_file_that_is_cut_off(name: str, saved: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(saved[name], tmp_path / "cut")
    file = folder / "model.safetensors"
    for keep in (0, 1000, -1) if name == "bert" else (-1,):
        file.write_bytes((saved[name] / file.name).read_bytes()[:keep])
        for dtype in ("auto", torch.float32):
            refused(
                lambda dtype=dtype: KINDS[name].auto.from_pretrained(folder, dtype=dtype),
                "must consist of whole safetensors files.*cannot be read.*download it again",
                file,
            )
