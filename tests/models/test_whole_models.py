"""Nothing of a loaded model is random but another head, whatever the architecture; and what was saved loads."""

import copy
import json
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from toy import toy_batch, toy_model
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    DistilBertConfig,
    DistilBertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaForSequenceClassification,
)

from hf_dynsparse import (
    DynSparseBertForMaskedLM,
    DynSparseBertForPreTraining,
    DynSparseQuantizationConfig,
    densify_,
    export_dense,
    prepare_qat_,
    sparsify_,
    to_int8_,
)
from hf_dynsparse.checkpoints.export import export_bsr, read_bsr
from hf_dynsparse.checkpoints.loading import load_model
from hf_dynsparse.hub.files import check_model


SIZES: dict[str, Any] = {"vocab_size": 64, "max_position_embeddings": 40}
BODY: dict[str, Any] = {**SIZES, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
ROBERTA: dict[str, Any] = {**BODY, "num_attention_heads": 2, "pad_token_id": 1}
HOW: dict[str, Any] = {"block_size": 8, "sparsity": 0.5}


def dense_roberta(**changes: Any) -> Any:
    return RobertaForMaskedLM(RobertaConfig(**ROBERTA, **changes))


def dense_gpt2(**changes: Any) -> Any:
    tokens = {"bos_token_id": 1, "eos_token_id": 2}
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=40, **tokens, **changes)
    )


def dense_distilbert(**changes: Any) -> Any:
    sizes = {"dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 2}
    return DistilBertForMaskedLM(DistilBertConfig(**SIZES, **sizes, **changes))


def int8_roberta() -> Any:
    model = prepare_qat_(sparsify_(RobertaForSequenceClassification(RobertaConfig(**ROBERTA)), **HOW))
    inputs = {name: toy_batch()[name] for name in ("input_ids", "attention_mask")}
    model.train()(**inputs, labels=torch.tensor([0, 1, 0, 1]))
    return to_int8_(model)


def int8_bert() -> Any:
    model = prepare_qat_(toy_model())
    model.train()(**toy_batch())
    return to_int8_(model)


# What is saved, the class that saved it, and tensors outside its head of three kinds: words, a norm, and a sparse or
# int8 layer.
BERT_LAYER = "bert.encoder.layer.1.attention.self.query"
ROBERTA_LAYER = "roberta.encoder.layer.1.attention.self.query"
MODELS: dict[str, tuple[Any, Any, tuple[str, str, str]]] = {
    "bert": (
        toy_model,
        AutoModelForMaskedLM,
        (
            "bert.embeddings.word_embeddings.weight",
            "bert.encoder.layer.0.output.LayerNorm.bias",
            f"{BERT_LAYER}.values",
        ),
    ),
    "roberta": (
        lambda: sparsify_(dense_roberta(), **HOW),
        AutoModelForMaskedLM,
        ("roberta.embeddings.word_embeddings.weight", "roberta.embeddings.LayerNorm.weight", f"{ROBERTA_LAYER}.bias"),
    ),
    "distilbert": (
        lambda: sparsify_(dense_distilbert(), **HOW),
        AutoModelForMaskedLM,
        (
            "distilbert.embeddings.word_embeddings.weight",
            "distilbert.transformer.layer.1.sa_layer_norm.weight",
            "distilbert.transformer.layer.1.ffn.lin1.block_index",
        ),
    ),
    "gpt2": (  # its head is tied to the words
        lambda: sparsify_(dense_gpt2(), **HOW),
        AutoModelForCausalLM,
        ("transformer.wte.weight", "transformer.ln_f.bias", "transformer.h.1.mlp.c_fc.values"),
    ),
    "int8 roberta": (
        int8_roberta,
        AutoModelForSequenceClassification,
        (
            "roberta.embeddings.word_embeddings.weight",
            "roberta.encoder.layer.0.output.LayerNorm.bias",
            f"{ROBERTA_LAYER}.input_scale",
        ),
    ),
    "int8 bert": (
        int8_bert,
        AutoModelForMaskedLM,
        ("bert.embeddings.word_embeddings.weight", "bert.embeddings.LayerNorm.weight", f"{BERT_LAYER}.block_code"),
    ),
}


@pytest.fixture(scope="module", params=MODELS)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    build, auto_class, tensors = MODELS[request.param]
    folder = tmp_path_factory.mktemp("saved")
    build().save_pretrained(folder)
    return folder, auto_class, tensors


def without(folder: Any, target: Any, *names: str, checksums: bool = False) -> Any:
    """A copy of a checkpoint that lacks tensors."""
    target.mkdir()
    (target / "config.json").write_bytes((folder / "config.json").read_bytes())
    with safe_open(folder / "model.safetensors", framework="pt") as weights:
        about = weights.metadata()
    tensors = load_file(folder / "model.safetensors")
    for name in names:
        del tensors[name]
    save_file(tensors, target / "model.safetensors", about if checksums else {"format": "pt"})
    return target


def reload(folder: Any, cls: Any = None, **arguments: Any) -> Any:
    return (cls or AutoModel).from_pretrained(folder, **arguments)


@pytest.mark.parametrize("kind", range(3), ids=["words", "norm", "layer"])
@pytest.mark.parametrize(("head", "checksums"), [("own", True), ("own", False), ("none", False), ("another", False)])
def test_outside_the_head_nothing_may_be_missing(
    saved: Any, head: str, kind: int, checksums: bool, tmp_path: Any
) -> None:
    folder, auto_class, tensors = saved
    others = {AutoModelForSequenceClassification: AutoModel}
    cls = {"own": auto_class, "none": AutoModel, "another": others.get(auto_class, AutoModelForSequenceClassification)}
    damaged = without(folder, tmp_path / "damaged", tensors[kind], checksums=checksums)
    with pytest.raises(ValueError, match=r"without|fits to no tensor") as caught:
        reload(damaged, cls[head])
    prefix = tensors[kind].partition(".")[0] + "."
    assert tensors[kind].removeprefix(prefix) in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_whole_checkpoint_loads_with_any_head(saved: Any, tmp_path: Any) -> None:
    folder, auto_class, _ = saved
    bare = without(folder, tmp_path / "bare")
    for cls in (auto_class, AutoModel, AutoModelForSequenceClassification):
        reload(folder, cls)
        reload(bare, cls)
    assert type(check_model(bare)) is type(reload(bare, auto_class))


@pytest.mark.parametrize(
    ("kind", "lost"),
    [
        ("roberta", "lm_head.dense.weight"),
        ("distilbert", "vocab_transform.bias"),
        ("int8 roberta", "classifier.out_proj.int8_values"),
        ("int8 bert", "cls.predictions.bias"),
    ],
)
def test_the_head_that_was_saved_is_not_drawn_anew(kind: str, lost: str, tmp_path: Any) -> None:
    build, auto_class, _ = MODELS[kind]
    build().save_pretrained(tmp_path / "whole")
    damaged = without(tmp_path / "whole", tmp_path / "damaged", lost)
    for load in (lambda: reload(damaged, auto_class), lambda: check_model(damaged)):
        with pytest.raises(ValueError, match=rf"{lost.rpartition('.')[0]}"):
            load()
    reload(damaged)  # without the head


def test_a_dense_checkpoint_that_is_made_sparse_must_be_whole_too(tmp_path: Any) -> None:
    dense_roberta().save_pretrained(tmp_path / "dense")
    how = DynSparseQuantizationConfig(**HOW)
    reload(tmp_path / "dense", quantization_config=how)
    lost = "roberta.embeddings.LayerNorm.weight"
    damaged = without(tmp_path / "dense", tmp_path / "damaged", lost)
    for cls in (AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification):
        with pytest.raises(ValueError, match=r"Got .* without `(roberta\.)?embeddings.LayerNorm.weight`"):
            reload(damaged, cls, quantization_config=how)
    # But whoever wrote it may have left out parts of its head.
    other = without(tmp_path / "dense", tmp_path / "head", "lm_head.dense.bias")
    reload(other, AutoModelForMaskedLM, quantization_config=how)


@pytest.mark.parametrize("sparse", [True, False], ids=["sparse", "dense"])
def test_a_head_of_another_size_starts_afresh_on_request(sparse: bool, tmp_path: Any) -> None:
    model = RobertaForSequenceClassification(RobertaConfig(**ROBERTA, num_labels=2))
    (sparsify_(model, **HOW) if sparse else model).save_pretrained(tmp_path)
    how = {} if sparse else {"quantization_config": DynSparseQuantizationConfig(**HOW)}
    arguments = {**how, "num_labels": 5, "ignore_mismatched_sizes": True}
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path, **arguments)
    assert loaded.classifier.out_proj.weight.shape == (5, 32)
    with pytest.raises(ValueError, match="without `roberta.embeddings.word_embeddings.weight`"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path, **arguments, vocab_size=99)


@pytest.mark.parametrize("cls", [AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification])
@pytest.mark.parametrize("kind", ["bert", "roberta", "int8 roberta"])
def test_no_layer_is_left_out(kind: str, cls: Any, tmp_path: Any) -> None:
    MODELS[kind][0]().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"a place for every sparse layer .* Got `\w+.encoder.layer.1"):
        reload(tmp_path, cls, num_hidden_layers=1)


# Tensors that are one in memory, and not by the configuration.


def resized(model: Any, tokens: int = 72) -> Any:
    model.resize_token_embeddings(tokens, mean_resizing=False)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if name.endswith("bias"):
                tensor.normal_()  # else all of them are zero
    return model.eval()


TWINS = {
    "bert": lambda tied: toy_model(tie_word_embeddings=tied),
    "bert, two heads": lambda tied: toy_model(cls=DynSparseBertForPreTraining, tie_word_embeddings=tied),
    "bert, mixed blocks": lambda tied: toy_model(
        tie_word_embeddings=tied, block_size={"*attention*": 2, "*": 8}, cls=DynSparseBertForMaskedLM
    ),
    "bert, dense": lambda tied: toy_model(sparsity=0.0, tie_word_embeddings=tied),
    "roberta": lambda tied: sparsify_(dense_roberta(tie_word_embeddings=tied), **HOW),
    "distilbert": lambda tied: sparsify_(dense_distilbert(tie_word_embeddings=tied), **HOW),
    "gpt2": lambda tied: sparsify_(dense_gpt2(tie_word_embeddings=tied), **HOW),
}


def logits(model: Any) -> torch.Tensor:
    ids = torch.arange(5, 29).view(2, 12)
    with torch.no_grad():
        return model.eval()(input_ids=ids)[0]


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def tied(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.mark.parametrize("kind", TWINS)
def test_a_resized_model_loads_as_it_was_saved(kind: str, tied: bool, tmp_path: Any) -> None:
    model = resized(TWINS[kind](tied))
    model.save_pretrained(tmp_path / "sparse")
    loaded, info = type(model).from_pretrained(tmp_path / "sparse", output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(logits(loaded), logits(model))
    loaded.save_pretrained(tmp_path / "again")
    first, again = (load_file(tmp_path / name / "model.safetensors") for name in ("sparse", "again"))
    assert first.keys() == again.keys()
    assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())
    assert torch.equal(logits(check_model(tmp_path / "sparse")), logits(model))


@pytest.mark.filterwarnings("ignore:Sparse BSR tensor support is in beta state:UserWarning")
@pytest.mark.parametrize("kind", TWINS)
def test_and_so_does_what_is_made_of_it(kind: str, tied: bool, tmp_path: Any) -> None:
    model = resized(TWINS[kind](tied))
    export_dense(model, tmp_path / "dense")
    torch.testing.assert_close(logits(load_model(tmp_path / "dense")), logits(model))
    if kind != "bert, dense":
        dense = densify_(copy.deepcopy(model))
        dense.save_pretrained(tmp_path / "densified")
        torch.testing.assert_close(logits(load_model(tmp_path / "densified")), logits(model))
    export_bsr(model, tmp_path / "bsr.safetensors")
    weights = read_bsr(tmp_path / "bsr.safetensors")
    dropped = model.all_tied_weights_keys.keys()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in weights and name not in dropped and parameter.shape == weights[name].shape:
            assert torch.equal(weights[name], parameter)
    assert json.loads((tmp_path / "dense" / "config.json").read_text())["vocab_size"] == 72
