"""Int8 models: saved, loaded with any head, inspected, described, and refused where they do not fit."""

import copy
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from test_qat import classifier, hash_of_indices, stock_bert
from toy import toy_batch, toy_model
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    BertForSequenceClassification,
)

from hf_dynsparse import (
    BlockSparseLinear,
    densify_,
    inspect_checkpoint,
    prepare_qat_,
    save_with_code,
    slim,
    sparse_layers,
    sparsify_,
    to_int8_,
    topology_summary,
    write_model_card,
)
from hf_dynsparse.checkpoints.export import export_bsr, export_program
from hf_dynsparse.compress.int8 import Int8Embedding, Int8Linear
from hf_dynsparse.compress.int8.bert import Int8BertLayer, Int8BertSelfOutput
from hf_dynsparse.compress.int8.quantizer import int8_modules
from hf_dynsparse.compress.slimming import add_gates_
from hf_dynsparse.hub.files import check_model
from hf_dynsparse.reports.facts import checkpoint_bytes, dense_bytes


def batch(labelled=False):
    rows = {name: tensor for name, tensor in toy_batch().items() if name != "labels"}
    return {**rows, "labels": torch.tensor([0, 1, 0, 1])} if labelled else rows


def outputs(model):
    with torch.no_grad():
        return model.eval()(**batch())[0]


def stock_classifier():
    return BertForSequenceClassification(stock_bert().config)


# What is made int8, by name: a model, and whether its embeddings are.
MODELS = {
    "sparse": (lambda: classifier(block_size=1, sparsity=0.9), False),
    "sparse with embeddings": (lambda: classifier(block_size=(1, 4)), True),
    "dense": (lambda: classifier(sparsity=0.0), True),
    "stock": (stock_classifier, True),
    "sparse stock": (lambda: sparsify_(stock_classifier(), block_size=4, sparsity=0.75), False),
}


@pytest.fixture(scope="module", params=MODELS)
def saved(request, tmp_path_factory):
    """A folder with an int8 model, the model itself, and what it was made from in evaluation mode."""
    build, embeddings = MODELS[request.param]
    folder = tmp_path_factory.mktemp("int8")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = prepare_qat_(build(), embeddings=embeddings)
    model.train()(**batch(labelled=True))
    rounded = copy.deepcopy(model).eval()
    to_int8_(model).save_pretrained(folder)
    return folder, model, rounded


@pytest.fixture(scope="module")
def sparse_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sparse")
    model = prepare_qat_(classifier(block_size=1, sparsity=0.9), embeddings=True)
    model.train()(**batch(labelled=True))
    to_int8_(model).save_pretrained(folder)
    return folder


def test_a_loaded_model_is_the_saved_one_bit_for_bit(saved):
    folder, model, rounded = saved
    loaded, info = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    assert not loaded.training
    assert torch.equal(outputs(loaded), outputs(model))
    torch.testing.assert_close(outputs(model), outputs(rounded), rtol=0, atol=2e-3)
    assert hash_of_indices_or_none(loaded) == hash_of_indices_or_none(rounded)
    again = folder / "again"
    loaded.save_pretrained(again)
    first, second = load_file(folder / "model.safetensors"), load_file(again / "model.safetensors")
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_steps_are_one_call_unless_somebody_looks(saved):
    _, model, _ = saved
    layers = [module for module in model.modules() if type(module) is Int8BertLayer]
    assert len(layers) == model.config.num_hidden_layers
    fused, seen = outputs(model), []
    ends = [layer.output for layer in layers] + [layer.attention.output for layer in layers]
    assert {type(end) for end in ends[len(layers) :]} == {Int8BertSelfOutput}
    hooks = [end.dense.register_forward_hook(lambda *_: seen.append(1)) for end in ends]
    apart = outputs(model)
    assert len(seen) == len(ends)
    for hook in hooks:
        hook.remove()
    torch.testing.assert_close(fused, apart, rtol=0, atol=2e-3)
    with torch.no_grad():
        states = model(**batch(), output_hidden_states=True).hidden_states
    assert len(states) == len(layers) + 1
    assert len(seen) == len(ends)


def hash_of_indices_or_none(model):
    return hash_of_indices(model) if sparse_layers(model) else None


def test_no_matrix_is_in_floating_point(saved):
    folder, model, _ = saved
    matrices = {n: t for n, t in load_file(folder / "model.safetensors").items() if t.dim() > 1 and "embedd" not in n}
    assert matrices
    assert {tensor.dtype for tensor in matrices.values()} == {torch.int8}
    words = model.get_input_embeddings()
    assert isinstance(words, Int8Embedding) == bool(model.config.quantization_config.embeddings)


def test_other_heads_start_afresh(saved, caplog):
    folder, model, _ = saved
    bare = AutoModel.from_pretrained(folder)
    with torch.no_grad():
        hidden = bare.eval()(**batch())[0]
        assert torch.equal(hidden, model.base_model(**batch())[0])
    answering = AutoModelForQuestionAnswering.from_pretrained(folder)
    assert type(answering.qa_outputs) is torch.nn.Linear
    assert outputs(answering).isfinite().all()


def test_lower_precision_leaves_scales_alone(saved):
    folder, model, _ = saved
    loaded = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.bfloat16)
    assert torch.equal(outputs(loaded), outputs(model))
    low = loaded.to(torch.bfloat16)
    assert outputs(low).dtype == torch.bfloat16
    assert {tensor.dtype for name, tensor in low.named_buffers() if name.endswith("input_scale")} == {torch.float32}
    torch.testing.assert_close(outputs(low).float(), outputs(model), rtol=0, atol=0.05)


def test_back_to_floating_point(saved):
    folder, model, _ = saved
    with pytest.raises(ValueError, match=r"Got a \w+ quantised by DynSparseInt8Quantizer. Call `model.deq"):
        densify_(model)
    loaded = AutoModelForSequenceClassification.from_pretrained(folder)
    floating = loaded.dequantize()
    assert not any(isinstance(module, Int8BertLayer | Int8BertSelfOutput) for module in floating.modules())
    assert not int8_modules(floating)
    torch.testing.assert_close(outputs(floating), outputs(model), rtol=0, atol=0.02)
    floating.train()(**batch(labelled=True)).loss.backward()  # it trains again
    floating.save_pretrained(folder / "floating")
    assert "quantization_config" not in json.loads((folder / "floating" / "config.json").read_text())
    plain = AutoModelForSequenceClassification.from_pretrained(folder / "floating")
    assert torch.equal(outputs(plain), outputs(floating))


def test_it_does_not_train(saved):
    _, model, _ = saved
    with pytest.raises(ValueError, match="An int8 model is for inference"):
        model.train()(**batch(labelled=True))
    model.eval()
    with pytest.raises(RuntimeError, match="does not require grad"):
        model(**batch(labelled=True)).loss.backward()


def test_it_may_be_pushed(saved):
    folder, model, _ = saved
    assert torch.equal(outputs(check_model(folder)), outputs(model))


def test_inspection(saved):
    folder, model, _ = saved
    report = inspect_checkpoint(folder)
    tensors = load_file(folder / "model.safetensors")
    assert {layer.name for layer in report.layers} == set(sparse_layers(model))
    for layer in report.layers:
        ours = sparse_layers(model)[layer.name]
        assert (layer.dtype, layer.code_bits) == ("I8", ours.code_bits)
        assert (
            layer.bytes == tensors[f"{layer.name}.int8_values"].numel() + tensors[f"{layer.name}.block_code"].numel()
        )
        assert layer.dense_bytes == 4 * ours.in_features * ours.out_features
        assert torch.equal(layer.layout.block_index, ours.block_index)
    dense = [module for module in model.modules() if isinstance(module, Int8Linear | Int8Embedding)]
    assert sum(report.int8.values()) == sum(module.int8_values.numel() for module in dense)
    assert f"{len(dense)} dense int8 matrices" in str(report)
    assert "bytes of the dense model in float32" in str(report)
    rest = sum(t.numel() * t.element_size() for n, t in tensors.items() if not n.endswith(("values", "code")))
    assert report.dense_bytes == rest + 4 * (report.positions + sum(report.int8.values()))
    json.dumps(report.to_dict())


def test_the_card(saved):
    folder, model, _ = saved
    shutil.copytree(folder, folder / "card", ignore=shutil.ignore_patterns("again", "floating", "card"))
    card = write_model_card(folder / "card").read_text()
    sparse = sparse_layers(model)
    assert "int8" in card.split("---")[1]  # a tag
    assert ("word embeddings are int8" in card) == bool(model.config.quantization_config.embeddings)
    assert "which round none of them" in card
    assert "trust_remote_code" not in card  # the code alone knows no int8
    assert ("model.dequantize()" in card) == bool(sparse)
    values = sum(layer.values.numel() for layer in sparse.values())
    codes = sum(layer.block_code.numel() for layer in sparse.values())
    positions = sum(layer.in_features * layer.out_features for layer in sparse.values())
    if sparse:
        assert f"| {(values + codes) / 1e6:.2f} | {4 * positions / 1e6:.2f} |" in card


def test_bytes_of_the_encoder(sparse_folder):
    model = AutoModelForSequenceClassification.from_pretrained(sparse_folder)
    own = sum(tensor.numel() * tensor.element_size() for tensor in model.bert.encoder.state_dict().values())
    assert checkpoint_bytes(sparse_folder, ".encoder.") == own
    twin = classifier(sparsity=0.0).bert.encoder
    assert dense_bytes(model, ".encoder.") == 4 * sum(parameter.numel() for parameter in twin.parameters())


def test_a_summary_knows_its_layers(sparse_folder):
    model = AutoModelForSequenceClassification.from_pretrained(sparse_folder)
    assert {layer.nnzb for layer in topology_summary(model).layers} == {102, 205}


def test_what_needs_floating_point_refuses_int8(saved, tmp_path):
    folder, model, _ = saved
    with pytest.raises(ValueError, match=r"Only weights in floating point can be exported.*model.dequantize"):
        export_program(folder)
    with pytest.raises(ValueError, match="Only weights in floating point can be exported"):
        export_bsr(model, tmp_path / "model.safetensors")
    for source in (model, folder):
        with pytest.raises(ValueError, match="knows weights in floating point only|Only a DynSparse BERT can bring"):
            save_with_code(source, tmp_path / "code")
    with pytest.raises(ValueError, match=r"`slim` must get a model in floating point.*Int8"):
        slim(model, [range(1)] * 2, [range(8)] * 2)
    with pytest.raises(ValueError, match="`add_gates_` must get a dense BERT without gates. Got one with Int8"):
        add_gates_(model)
    assert not any(tmp_path.iterdir())


def test_another_number_of_labels_is_refused(sparse_folder):
    with pytest.raises(ValueError, match=r"`classifier\.int8_values` must have shape \(3, 32\)"):
        AutoModelForSequenceClassification.from_pretrained(sparse_folder, num_labels=3, ignore_mismatched_sizes=True)


def test_embeddings_tied_to_a_head_are_refused(sparse_folder):
    with pytest.raises(ValueError, match="An int8 embedding cannot be tied to an output layer"):
        AutoModelForMaskedLM.from_pretrained(sparse_folder)


def test_a_model_in_floating_point_does_not_load_as_int8(sparse_folder, tmp_path):
    toy_model().save_pretrained(tmp_path)
    int8 = AutoModelForSequenceClassification.from_pretrained(sparse_folder)
    with pytest.raises(ValueError, match="pre-quantized"):
        AutoModelForMaskedLM.from_pretrained(tmp_path, quantization_config=int8.config.quantization_config)
    with pytest.raises(ValueError, match="Got int8: call `model.dequantize"):
        int8.to_dense()


def test_dense_layers_of_a_model_in_memory_keep_their_blocks():
    model = prepare_qat_(classifier())
    model.train()(**batch(labelled=True))
    floating = to_int8_(model).dequantize()
    assert all(type(layer) is BlockSparseLinear for layer in sparse_layers(floating).values())
    assert len(sparse_layers(floating)) == 12
