"""Nothing of a loaded model is random but another head, whatever the architecture; and what was saved loads."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from toy import toy_model
from transformers import (
    AutoModel,
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
    sparsify_,
)
from hf_dynsparse.checkpoints.export import export_bsr, read_bsr
from hf_dynsparse.checkpoints.loading import load_model


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


def without(folder: Any, target: Any, name: str) -> Any:
    """A copy of a checkpoint that lacks a tensor."""
    target.mkdir()
    (target / "config.json").write_bytes((folder / "config.json").read_bytes())
    tensors = load_file(folder / "model.safetensors")
    del tensors[name]
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return target


def reload(folder: Any, cls: Any = None, **arguments: Any) -> Any:
    return (cls or AutoModel).from_pretrained(folder, **arguments)


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


# Every architecture, tied or untied; the two that differ most, both.
PAIRS = [(kind, number % 2 == 0) for number, kind in enumerate(TWINS)] + [("bert", False), ("roberta", False)]


@pytest.mark.filterwarnings("ignore:Sparse BSR tensor support is in beta state:UserWarning")
@pytest.mark.parametrize(("kind", "tied"), PAIRS)
def test_a_resized_model_loads_as_it_was_saved_and_so_does_what_is_made_of_it(
    kind: str, tied: bool, tmp_path: Path
) -> None:
    model = resized(TWINS[kind](tied))
    expected = logits(model)
    model.save_pretrained(tmp_path / "sparse")
    loaded, info = type(model).from_pretrained(tmp_path / "sparse", output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(logits(loaded), expected)
    loaded.save_pretrained(tmp_path / "again")
    first, again = (load_file(tmp_path / name / "model.safetensors") for name in ("sparse", "again"))
    assert first.keys() == again.keys()
    assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())

    export_dense(model, tmp_path / "dense")
    torch.testing.assert_close(logits(load_model(tmp_path / "dense")), expected)
    assert json.loads((tmp_path / "dense" / "config.json").read_text())["vocab_size"] == 72
    export_bsr(model, tmp_path / "bsr.safetensors")
    weights = read_bsr(tmp_path / "bsr.safetensors")
    dropped = model.all_tied_weights_keys.keys()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in weights and name not in dropped and parameter.shape == weights[name].shape:
            assert torch.equal(weights[name], parameter)
    if kind != "bert, dense":
        densify_(model).save_pretrained(tmp_path / "densified")
        torch.testing.assert_close(logits(load_model(tmp_path / "densified")), expected)
