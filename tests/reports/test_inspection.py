"""What is said of a saved model is what the model is, and its weights are not read for it."""

import json
import shutil
import tracemalloc

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from toy import toy_model
from transformers import GPT2Config, GPT2LMHeadModel, RobertaConfig, RobertaForMaskedLM

from hf_dynsparse import (
    DynSparseBertConfig,
    DynSparseBertForMaskedLM,
    DynSparseBertForSequenceClassification,
    export_dense,
    inspect_checkpoint,
    sparse_layers,
    sparsify_,
)
from hf_dynsparse.reports.facts import checkpoint_bytes
from hf_dynsparse.reports.layers import model_facts
from hf_dynsparse.topology import dof_coverage, prune_regrow_, track_


def model_of(kind):
    """A small sparse model."""
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_attention_heads": 2, "max_position_embeddings": 40}
    if kind == "roberta":
        roberta = RobertaForMaskedLM(RobertaConfig(num_hidden_layers=2, intermediate_size=64, **sizes))
        return sparsify_(roberta, block_size=(4, 8), sparsity=0.5, distribution="erk")
    if kind == "gpt2":
        return sparsify_(GPT2LMHeadModel(GPT2Config(n_layer=1, bos_token_id=1, eos_token_id=1, **sizes)), 4, 0.5)
    if kind == "half":
        return toy_model(block_size=1).bfloat16()
    return toy_model(num_hidden_layers=11, hidden_size=16, intermediate_size=32)  # 10 stands after 9


@pytest.mark.parametrize(("kind", "shards"), [("bert", 3), ("half", 1), ("roberta", 3), ("gpt2", 1)])
def test_the_report_is_the_model(kind, shards, tmp_path):
    """What is found in the files is what `model_facts` finds in the model."""
    model = model_of(kind)
    size = sum(tensor.nbytes for tensor in model.state_dict().values())
    model.save_pretrained(tmp_path / "sparse", max_shard_size=size // shards + 1000)
    report = inspect_checkpoint(tmp_path / "sparse")

    layers = sparse_layers(model)
    assert [layer.name for layer in report.layers] == list(layers)
    for found, layer in zip(report.layers, layers.values(), strict=True):
        assert torch.equal(found.layout.block_index, layer.block_index)
        assert found.bytes == layer.values.nbytes + layer.block_index.nbytes
        assert found.dense_bytes == layer.to_dense().nbytes
        assert found.coverage is None
    facts = model_facts(model)
    for found, layer in zip(report.layers, facts.layers, strict=True):
        assert {name: getattr(found, name) for name in vars(layer)} == vars(layer)
        assert (found.layout.shape, found.layout.block_shape) == (layer.shape, layer.block_shape)
    assert report.architecture == type(model).__name__
    assert report.nnz == sum(layer.values.numel() for layer in layers.values())
    assert 0 < report.sparsity == facts.sparsity < 1
    assert facts.parameters == model.num_parameters()
    assert facts.bytes == checkpoint_bytes(tmp_path / "sparse")

    files = {path.name: path.stat().st_size for path in (tmp_path / "sparse").glob("*.safetensors")}
    assert (len(files) > 1) == (shards > 1)
    assert report.files == files
    export_dense(model, tmp_path / "dense")
    assert report.dense_bytes == facts.dense_bytes == checkpoint_bytes(tmp_path / "dense")
    assert json.loads(json.dumps(report.to_dict()))["bytes"] == sum(files.values())


def test_a_dense_model_says_so(tmp_path):
    export_dense(toy_model(), tmp_path / "dense")
    report = inspect_checkpoint(tmp_path / "dense")
    assert (report.architecture, report.layers, report.sparsity) == ("BertForMaskedLM", (), 0.0)
    assert report.dense_bytes == checkpoint_bytes(tmp_path / "dense")
    assert str(report).splitlines()[0].endswith("BertForMaskedLM, dense: no sparse layers")
    assert "of the dense model" not in str(report)


def test_the_table(tmp_path):
    toy_model(num_hidden_layers=1).save_pretrained(tmp_path)
    report = inspect_checkpoint(tmp_path / "model.safetensors")
    lines = str(report).splitlines()
    assert lines[0] == f"{tmp_path / 'model.safetensors'}: DynSparseBertForMaskedLM, sparse"
    assert lines[2].split() == ["layer", "shape", "block", "nnzb", "density", "bytes", "of", "dense"]
    name = "bert.encoder.layer.0.attention.self.query"
    assert lines[3].split() == [name, "32x32", "4x4", "16", "0.2500", "1,088", "0.266"]
    assert len({len(line) for line in lines[2:9]}) == 1
    assert lines[10] == "6 sparse layers, 2,048 of 8,192 entries active, sparsity 0.7500"
    size = (tmp_path / "model.safetensors").stat().st_size
    assert lines[11:] == [
        f"model.safetensors: {size:,} bytes",
        f"{size / report.dense_bytes:.1%} of the {report.dense_bytes:,} bytes of the dense model",
    ]


def test_a_run_that_has_not_ended_has_a_coverage(tmp_path):
    model = toy_model()
    layers = sparse_layers(model)
    for update, layer in enumerate(layers.values()):
        track_(layer)
        prune_regrow_(layer, pruning_ratio=0.5, generator=torch.Generator().manual_seed(update))
    model.save_pretrained(tmp_path / "checkpoint-3")
    report = inspect_checkpoint(tmp_path / "checkpoint-3")
    for found, layer in zip(report.layers, layers.values(), strict=True):
        assert found.coverage == dof_coverage([layer]) == 0.375
        history = layer.ever_active.nbytes + layer.active_since.nbytes
        assert found.bytes == layer.values.nbytes + layer.block_index.nbytes + history
    assert report.dense_bytes == inspect_checkpoint_of(model.to_dense(), tmp_path / "dense").dense_bytes
    assert str(report).splitlines()[3].endswith("0.3750")


def inspect_checkpoint_of(model, folder):
    model.save_pretrained(folder)
    return inspect_checkpoint(folder)


def test_weights_are_not_read(tmp_path):
    config = DynSparseBertConfig.preset("mini", vocab_size=8192)
    DynSparseBertForMaskedLM(config).save_pretrained(tmp_path)
    inspect_checkpoint(tmp_path)  # imports what it needs
    tracemalloc.start()
    report = inspect_checkpoint(tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert report.bytes > 9_000_000
    assert peak < 1_000_000


@pytest.fixture
def saved(tmp_path):
    toy_model(cls=DynSparseBertForSequenceClassification).save_pretrained(tmp_path)
    return tmp_path


def change(folder, name, tensor):
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, name: tensor}, folder / "model.safetensors", {"format": "pt"})


QUERY = "bert.encoder.layer.0.attention.self.query"


@pytest.mark.parametrize(
    ("index", "problem"),
    [
        ([64, *range(15)], r"must lie in \[0, 64\). Got 64 in slot 0"),
        ([3, *range(15)], "must name each block once. Got 3 twice"),
    ],
)
def test_a_damaged_index_is_named(saved, index, problem):
    change(saved, f"{QUERY}.block_index", torch.tensor(index, dtype=torch.int32))
    with pytest.raises(ValueError, match=rf"`block_index` of `{QUERY}` in .* {problem}"):
        inspect_checkpoint(saved)


@pytest.mark.parametrize(
    ("leaf", "tensor"),
    [
        ("block_index", torch.arange(16)),
        ("block_index", torch.arange(15, dtype=torch.int32)),
        ("values", torch.ones(16, 16)),
    ],
    ids=["dtype", "length", "shape"],
)
def test_tensors_that_do_not_agree_are_named(saved, leaf, tensor):
    change(saved, f"{QUERY}.{leaf}", tensor)
    with pytest.raises(ValueError, match=rf"`{QUERY}` must have `values` of shape .* Got {{'values': \('F32'"):
        inspect_checkpoint(saved)


@pytest.mark.parametrize("lost", [["block_index"], ["values"], ["values", "block_index"]])
def test_no_layer_is_passed_over(saved, lost):
    tensors = load_file(saved / "model.safetensors")
    kept = {name: x for name, x in tensors.items() if name not in {f"{QUERY}.{leaf}" for leaf in lost}}
    save_file(kept, saved / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=rf"`{QUERY}` must have `values` .* and `block_index` .* Got .* in {saved}"):
        inspect_checkpoint(saved)


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]},
        {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": ["2"], "data_offsets": [0, 8]},
        {"dtype": 4, "shape": [2], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2], "data_offsets": [0]},
        {"dtype": "F32", "shape": [2]},
        [],
    ],
)
def test_a_damaged_header_is_named(saved, entry):
    header = json.dumps({"a": entry}).encode()
    (saved / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(ValueError, match="must be a safetensors file. Got .*model.safetensors, which is none"):
        inspect_checkpoint(saved)


def test_one_shard_alone_may_lack_half_of_a_layer(saved):
    tensors = load_file(saved / "model.safetensors")
    save_file({f"{QUERY}.block_index": tensors[f"{QUERY}.block_index"]}, saved / "shard.safetensors")
    with pytest.raises(ValueError, match=rf"`{QUERY}` must have `values` .* Name the whole checkpoint"):
        inspect_checkpoint(saved / "shard.safetensors")


def test_weights_of_another_model_are_named(saved):
    change(saved, "bert.encoder.layer.7.output.dense.block_index", torch.arange(16, dtype=torch.int32))
    with pytest.raises(
        ValueError, match=r"with `bert.encoder.layer.7.output.dense`, which a .* does not have as such"
    ):
        inspect_checkpoint(saved)


@pytest.mark.parametrize("content", ["empty", "text", "cut in the header", "cut in the data", "list"])
def test_a_damaged_file_is_named(saved, content):
    file = saved / "model.safetensors"
    whole = file.read_bytes()
    damaged = {
        "empty": b"",
        "text": b"not a safetensors file, but a text",
        "cut in the header": whole[:1000],
        "cut in the data": whole[:-1],
        "list": (2).to_bytes(8, "little") + b"[]",
    }
    file.write_bytes(damaged[content])
    problem = "must be whole" if content == "cut in the data" else "must be a safetensors file"
    with pytest.raises(ValueError, match=rf"A file of weights {problem}. Got .*model.safetensors"):
        inspect_checkpoint(saved)


def test_weights_and_configuration_must_be_there(saved):
    (saved / "model.safetensors").rename(saved / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"must hold model.safetensors or model.safetensors.index.json"):
        inspect_checkpoint(saved)
    (saved / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"must be a folder with a config.json or a repository"):
        inspect_checkpoint(saved)


def test_offline_the_cache_serves(saved, tmp_path, monkeypatch):
    repository = tmp_path / "hub" / "models--user--name"
    commit = "0" * 40
    shutil.copytree(saved, repository / "snapshots" / commit, ignore=shutil.ignore_patterns("hub"))
    (repository / "refs").mkdir()
    (repository / "refs" / "v1").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert len(inspect_checkpoint("user/name@v1").layers) == 12
    with pytest.raises(FileNotFoundError, match="Got user/name: "):
        inspect_checkpoint("user/name")
