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


QUERY = "bert.encoder.layer.0.attention.self.query"


def tensors(lost=(), layer=QUERY, **new):
    """Rewrite the file without the leaves `lost` of a layer, and with `new` ones."""

    def rewrite(file):
        kept = {name: x for name, x in load_file(file).items() if name not in {f"{layer}.{leaf}" for leaf in lost}}
        save_file(kept | {f"{layer}.{leaf}": x for leaf, x in new.items()}, file, {"format": "pt"})

    return rewrite


def content(damage):
    return lambda file: file.write_bytes(damage(file.read_bytes()))


def header(entry):
    """A file whose only tensor is described by `entry`."""
    text = json.dumps({"a": entry}).encode()
    return content(lambda _: len(text).to_bytes(8, "little") + text + bytes(8))


def index(*ids):
    return tensors(block_index=torch.tensor(ids, dtype=torch.int32))


PARTS, NONE = (
    f"`{QUERY}` must have `values` of shape .* and `block_index` .* Got ",
    "must be a safetensors file. Got .*",
)
DAMAGE = {
    "an id out of range": (index(64, *range(15)), rf"of `{QUERY}` in .* must lie in \[0, 64\). Got 64 in slot 0"),
    "an id twice": (index(3, *range(15)), f"of `{QUERY}` in .* must name each block once. Got 3 twice"),
    "another dtype": (tensors(block_index=torch.arange(16)), PARTS + "{'values': .'F32'"),
    "another length": (index(*range(15)), PARTS + "{'values': .'F32'"),
    "another shape": (tensors(values=torch.ones(16, 16)), PARTS + "{'values': .'F32'"),
    "no index": (tensors(lost=["block_index"]), PARTS),
    "no values": (tensors(lost=["values"]), PARTS),
    "no layer": (tensors(lost=["values", "block_index"]), PARTS),
    "a layer of another model": (
        tensors(layer="bert.encoder.layer.7.output.dense", block_index=torch.arange(16, dtype=torch.int32)),
        "with `bert.encoder.layer.7.output.dense`, which a .* does not have as such",
    ),
    "an end before the begin": (header({"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}), NONE),
    "a negative side": (header({"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}), NONE),
    "a side in words": (header({"dtype": "F32", "shape": ["2"], "data_offsets": [0, 8]}), NONE),
    "a number as dtype": (header({"dtype": 4, "shape": [2], "data_offsets": [0, 8]}), NONE),
    "one offset": (header({"dtype": "F32", "shape": [2], "data_offsets": [0]}), NONE),
    "no offsets": (header({"dtype": "F32", "shape": [2]}), NONE),
    "a list as entry": (header([]), NONE),
    "a list as header": (content(lambda whole: (2).to_bytes(8, "little") + b"[]"), NONE),
    "nothing": (content(lambda whole: b""), NONE),
    "a text": (content(lambda whole: b"not a safetensors file, but a text"), NONE),
    "cut in the header": (content(lambda whole: whole[:1000]), NONE),
    "cut in the data": (content(lambda whole: whole[:-1]), "must be whole. Got .*"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_named(saved, case):
    damage, problem = DAMAGE[case]
    file = saved / "model.safetensors"
    damage(file)
    with pytest.raises(ValueError, match=problem) as error:
        inspect_checkpoint(saved)
    assert str(saved) in str(error.value)


def test_one_shard_alone_may_lack_half_of_a_layer(saved):
    name = f"{QUERY}.block_index"
    save_file({name: load_file(saved / "model.safetensors")[name]}, saved / "shard.safetensors")
    with pytest.raises(ValueError, match=rf"`{QUERY}` must have `values` .* Name the whole checkpoint"):
        inspect_checkpoint(saved / "shard.safetensors")


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
