"""A model in other forms gives the same outputs: dense folders, ONNX, exported programs, BSR tensors; and back."""

import io
import json
import sys

import pytest
import torch
from toy import toy_config, toy_model, toy_tokenizer
from transformers import (
    AutoTokenizer,
    BertForMaskedLM,
    BertForNextSentencePrediction,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaForMaskedLM,
)

from hf_dynsparse import (
    DynSparseBertForMultipleChoice,
    DynSparseBertForSequenceClassification,
    export_bsr,
    export_dense,
    export_onnx,
    export_program,
    read_bsr,
    sparse_layers,
    sparsify_,
    sparsify_checkpoint,
)
from hf_dynsparse.checkpoints.loading import load_model


OTHERS = {
    "roberta": (RobertaForMaskedLM, RobertaConfig, {}),
    "llama": (LlamaForCausalLM, LlamaConfig, {}),
    "gpt2": (GPT2LMHeadModel, GPT2Config, {"n_inner": 64, "bos_token_id": 1, "eos_token_id": 1}),
}


def other_model(kind):
    """A small stock model with sparse layers."""
    cls, config, extra = OTHERS[kind]
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 40}
    if kind != "gpt2":
        sizes["intermediate_size"] = 64
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return sparsify_(cls(config(vocab_size=64, **sizes, **extra)), block_size=4, sparsity=0.5).eval()


def inputs_for(model, shape=(3, 11), seed=0):
    """Token ids, the last row padded."""
    ids = torch.randint(5, 60, shape, generator=torch.Generator().manual_seed(seed))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    inputs["attention_mask"][-1, ..., shape[-1] // 2 + 1 :] = 0
    if "bert" in model.config.model_type:
        inputs["token_type_ids"] = ids % 2
    return inputs


def outputs_of(model, inputs):
    with torch.no_grad():
        return dict(model(**inputs))


def assert_same_outputs(one, other, shape=(3, 11)):
    inputs = inputs_for(one, shape)
    ours, theirs = (outputs_of(model.eval(), inputs) for model in (one, other))
    tensors = {name: value for name, value in ours.items() if torch.is_tensor(value)}
    assert tensors
    for name, value in tensors.items():
        torch.testing.assert_close(theirs[name], value, msg=lambda text, name=name: f"{name}: {text}")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A DynSparse BERT with its tokenizer."""
    folder = tmp_path_factory.mktemp("saved")
    toy_model(num_hidden_layers=1).save_pretrained(folder)
    toy_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def dense(saved, tmp_path_factory):
    """The same, dense."""
    folder = tmp_path_factory.mktemp("dense") / "dense"
    export_dense(saved, folder)
    return folder


def test_a_dense_folder_is_a_stock_one(saved, dense):
    config = json.loads((dense / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("bert", ["BertForMaskedLM"])
    assert not {"sparsity", "block_size", "nnzb", "quantization_config", "auto_map"} & config.keys()
    model, report = BertForMaskedLM.from_pretrained(dense, output_loading_info=True)
    assert not any(report.values())
    assert_same_outputs(load_model(saved), model)
    assert AutoTokenizer.from_pretrained(dense).get_vocab() == toy_tokenizer().get_vocab()


def test_a_model_in_memory_stays_sparse(tmp_path):
    model = toy_model(cls=DynSparseBertForMultipleChoice).eval()
    export_dense(model, tmp_path / "dense")
    dense = load_model(tmp_path / "dense")
    assert type(dense).__name__ == "BertForMultipleChoice"
    assert_same_outputs(model, dense, (3, 2, 11))
    assert sparse_layers(model)


@pytest.mark.parametrize("kind", OTHERS)
def test_other_architectures_become_dense(kind, tmp_path):
    model = other_model(kind)
    export_dense(model, tmp_path / "memory")
    model.save_pretrained(tmp_path / "sparse")
    export_dense(tmp_path / "sparse", tmp_path / "folder")
    for name in ("memory", "folder"):
        assert "quantization_config" not in (tmp_path / name / "config.json").read_text()
        dense = load_model(tmp_path / name)
        assert type(dense) is type(model)
        assert not sparse_layers(dense)
        assert_same_outputs(model, dense)
    assert sparse_layers(model)


def test_dense_and_back_is_the_same_model(saved, dense, tmp_path):
    sparsify_checkpoint(dense, tmp_path / "sparse", sparsity=0.75, block_size=4)
    first, second = (load_model(folder).state_dict() for folder in (saved, tmp_path / "sparse"))
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(second[name], tensor), name
    assert AutoTokenizer.from_pretrained(tmp_path / "sparse").get_vocab() == toy_tokenizer().get_vocab()


def test_a_dense_head_becomes_a_sparse_one(tmp_path):
    stock = BertForSequenceClassification(toy_config(sparsity=0.0).to_stock())
    stock.save_pretrained(tmp_path / "dense")
    sparsify_checkpoint(tmp_path / "dense", tmp_path / "sparse", sparsity=0.5, block_size=(1, 4), distribution="erk")
    model = load_model(tmp_path / "sparse")
    config = toy_config(sparsity=0.5, block_size=(1, 4), distribution="erk")
    assert type(model) is DynSparseBertForSequenceClassification
    assert model.config.nnzb_per_layer() == config.nnzb_per_layer()
    assert_same_outputs(DynSparseBertForSequenceClassification.from_dense(stock, config), model)


def test_the_dense_twin_of_a_run_becomes_sparse(tmp_path):
    toy_model(sparsity=0).save_pretrained(tmp_path / "dense")
    sparsify_checkpoint(tmp_path / "dense", tmp_path / "sparse", block_size=4)
    assert len(sparse_layers(load_model(tmp_path / "sparse"))) == 12


@pytest.mark.parametrize("cls", [BertForNextSentencePrediction, RobertaForMaskedLM])
def test_what_has_no_class_of_ours_gets_sparse_layers(cls, tmp_path):
    if cls is RobertaForMaskedLM:
        stock = cls(RobertaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_attention_heads=2))
    else:
        stock = cls(toy_config(sparsity=0.0).to_stock())
    stock.save_pretrained(tmp_path / "dense")
    sparsify_checkpoint(tmp_path / "dense", tmp_path / "sparse", sparsity=0.75, block_size=4)
    model = load_model(tmp_path / "sparse")
    assert type(model) is cls
    assert len(sparse_layers(model)) == 6 * stock.config.num_hidden_layers
    assert_same_outputs(sparsify_(stock, block_size=4, sparsity=0.75), model)


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_what_is_sparse_is_not_made_sparse(kind, saved, tmp_path):
    source = saved
    if kind == "roberta":
        source = tmp_path / "roberta"
        other_model(kind).save_pretrained(source)
    with pytest.raises(ValueError, match=r"`source` must be dense. Got .* Convert it to dense first"):
        sparsify_checkpoint(source, tmp_path / "sparse")


def test_a_block_that_does_not_fit_leaves_nothing(dense, tmp_path):
    with pytest.raises(Exception, match="`block_size` must divide both sides"):
        sparsify_checkpoint(dense, tmp_path / "sparse", block_size=5)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("ignore:Sparse BSR tensor support is in beta state:UserWarning")
@pytest.mark.parametrize("kind", ["bert", "wide", *OTHERS])
def test_bsr_tensors_are_the_weights(kind, tmp_path):
    model = toy_model(block_size=(2, 8) if kind == "wide" else 4) if kind in ("bert", "wide") else other_model(kind)
    for layer in sparse_layers(model).values():  # slots in no particular order, as after updates
        order = torch.randperm(layer.nnzb, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            layer.block_index.copy_(layer.block_index[order])
            layer.values.normal_()
    export_bsr(model, tmp_path / "bsr.safetensors")
    weights = read_bsr(tmp_path / "bsr.safetensors")
    export_dense(model, tmp_path / "dense")
    dense = load_model(tmp_path / "dense")
    assert weights.keys() == dense.state_dict().keys() - dense.all_tied_weights_keys.keys()
    for name, layer in sparse_layers(model).items():
        weight = weights.pop(f"{name}.weight")
        assert (weight.layout, weight.crow_indices().dtype) == (torch.sparse_bsr, torch.int32)
        assert weight.values().shape == layer.values.shape
        assert torch.equal(weight.to_dense(), layer.to_dense())
        if kind != "wide":  # PyTorch multiplies by square blocks only
            x = torch.randn(layer.in_features, 7)
            torch.testing.assert_close(weight @ x, layer.to_dense() @ x)
    for name, tensor in weights.items():
        assert torch.equal(tensor, dense.state_dict()[name]), name


def test_another_file_is_no_file_of_bsr_tensors(saved):
    with pytest.raises(ValueError, match=r"must hold `shapes` among its metadata. Got .*model.safetensors"):
        read_bsr(saved / "model.safetensors")


def test_a_program_is_sparse_and_takes_any_shape():
    model = toy_model(cls=DynSparseBertForMultipleChoice, num_hidden_layers=1, position_bias="alibi").eval()
    program = export_program(model)
    assert str(program.graph).count("hf_dynsparse.linear") == len(sparse_layers(model))
    assert program.state_dict.keys() == model.state_dict().keys()
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    module = torch.export.load(file).module()
    for shape in [(1, 1), (5, 32), (3, 7)]:
        inputs = inputs_for(model, (shape[0], 4, shape[1]))
        found, expected = outputs_of(module, inputs), outputs_of(model, inputs)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value)


def test_a_model_in_training_is_not_exported():
    with pytest.raises(ValueError, match="must be in evaluation mode"):
        export_program(toy_model().train())


@pytest.mark.parametrize("kind", ["slimmed bert", "llama"])
def test_onnxruntime_gives_the_same_logits(kind, tmp_path):
    import onnx
    import onnxruntime

    if kind == "llama":
        source = model = other_model(kind).bfloat16()
    else:
        slim = {"intermediate_size": 40, "heads_per_layer": [1], "intermediate_sizes": [12]}
        model = toy_model(num_hidden_layers=1, num_attention_heads=4, **slim).eval()
        model.save_pretrained(tmp_path / "saved")
        source = tmp_path / "saved"
    (tmp_path / "onnx").mkdir()
    export_onnx(source, tmp_path / "onnx" / "model.onnx")  # of llama without the cache that it puts out for generation
    (file,) = (tmp_path / "onnx").iterdir()
    sides = {side for weight in onnx.load(file).graph.initializer for side in weight.dims}
    assert {12, 40} & sides == ({12} if kind == "slimmed bert" else set())  # it stays slim
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    names = ["input_ids", "attention_mask", *["token_type_ids"] * (kind != "llama")]
    found = {entry.name: (entry.shape, entry.type) for entry in session.get_inputs()}
    assert found == dict.fromkeys(names, (["batch", "sequence"], "tensor(int64)"))
    (logits,) = session.get_outputs()
    assert (logits.name, logits.shape, logits.type) == ("logits", ["batch", "sequence", 64], "tensor(float)")
    model = model.float()
    for seed, shape in enumerate([(1, 1), (2, 8), (5, 32), (3, 7)]):
        inputs = inputs_for(model, shape, seed)
        (found,) = session.run(["logits"], {name: tensor.numpy() for name, tensor in inputs.items()})
        torch.testing.assert_close(torch.from_numpy(found), outputs_of(model, inputs)["logits"])


def test_onnx_says_what_to_install(saved, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ImportError, match=r"pip install 'hf_dynsparse\[onnx\]'"):
        export_onnx(saved, tmp_path / "model.onnx")


@pytest.mark.parametrize("export", [export_dense, export_onnx, export_bsr])
def test_nothing_is_overwritten(export, saved, tmp_path):
    (tmp_path / "kept").write_text("kept")
    with pytest.raises(FileExistsError, match="The target must not exist yet"):
        export(saved, tmp_path / "kept")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["kept"]
