"""LoRA on sparse layers: frozen blocks, adapters that train, save and load, and merging once the layers are dense."""

import copy
from pathlib import Path

import pytest
import torch
from test_stock import ARCHITECTURES, HOW, assert_equal_states, build, outputs
from toy import toy_arguments, toy_collator, toy_examples, toy_model
from transformers import AutoModelForMaskedLM, Trainer
from transformers.integrations.peft import MIN_PEFT_VERSION

from hf_dynsparse import DynSparseTrainer, densify_, sparse_layers, sparsify_


pytest.importorskip("peft", reason="peft is optional")
from peft import LoraConfig, PeftModel, get_peft_model  # noqa: E402

from hf_dynsparse.models.lora import BlockSparseLora, register_lora  # noqa: E402


# PEFT asks transformers for a property by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

TARGETS = {
    "roberta": ["query", "value", "lm_head.dense"],  # two sparse ones and a dense one
    "gpt2": ["c_attn", "c_proj"],
    "llama": ["q_proj", "down_proj"],
    "dynsparse_bert": ["query", "value"],
}


def sparse_model(name: str = "roberta"):
    return toy_model() if name == "dynsparse_bert" else sparsify_(build(name), **HOW)


def lora(name: str = "roberta", **overrides):
    return register_lora(LoraConfig(**{"r": 4, "target_modules": TARGETS[name], **overrides}))


def with_adapter(name: str = "roberta"):
    """A sparse model with adapters that change its outputs."""
    model = get_peft_model(sparse_model(name), lora(name))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.2, generator=generator)
    return model


def adapters(model) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in model.state_dict().items() if "lora_" in name}


@pytest.mark.parametrize("name", TARGETS)
def test_only_adapters_train(name):
    model = get_peft_model(sparse_model(name), lora(name))
    assert all(("lora_" in key) == parameter.requires_grad for key, parameter in model.named_parameters())
    assert sum(isinstance(module, BlockSparseLora) for module in model.modules()) >= 4
    torch.testing.assert_close(outputs(model), outputs(sparse_model(name)))  # B is zero


@pytest.mark.parametrize("name", TARGETS)
def test_save_and_load(name, tmp_path):
    model = with_adapter(name)
    assert not torch.allclose(outputs(model), outputs(sparse_model(name)))
    model.save_pretrained(tmp_path)
    config = register_lora(LoraConfig.from_pretrained(tmp_path))
    loaded = PeftModel.from_pretrained(sparse_model(name), tmp_path, config=config)
    assert torch.equal(outputs(loaded), outputs(model))


@pytest.mark.parametrize("trainer_class", [DynSparseTrainer, Trainer])
def test_train_and_resume(trainer_class, tmp_path):
    def trainer():
        torch.manual_seed(0)
        return trainer_class(
            get_peft_model(sparse_model(), lora()),
            toy_arguments(tmp_path, max_steps=6, num_topology_updates=0, save_strategy="steps", save_steps=3),
            data_collator=toy_collator(),
            train_dataset=toy_examples(24),
        )

    straight = trainer()
    before = copy.deepcopy(straight.model.state_dict())
    straight.train()
    after = straight.model.state_dict()
    assert all(torch.equal(after[name], before[name]) != ("lora_" in name) for name in after)
    resumed = trainer()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert_equal_states(adapters(straight.model), adapters(resumed.model))


def test_updates_of_frozen_values_are_refused(tmp_path):
    trainer = DynSparseTrainer(
        get_peft_model(sparse_model(), lora()),
        toy_arguments(tmp_path),
        data_collator=toy_collator(),
        train_dataset=toy_examples(24),
    )
    with pytest.raises(
        ValueError, match=r"values must train. Got frozen values in 12 of 12 .* `num_topology_updates=0`"
    ):
        trainer.train()


@pytest.mark.parametrize("name", TARGETS)
def test_merging_wants_a_dense_model(name, tmp_path):
    model = with_adapter(name)
    expected = outputs(model)
    with pytest.raises(ValueError, match=r"Merging needs a dense weight.* call `densify_\(model\)` before"):
        model.merge_and_unload()
    torch.testing.assert_close(outputs(model), expected)
    merged = densify_(model).merge_and_unload()
    torch.testing.assert_close(outputs(merged), expected)
    merged.save_pretrained(tmp_path)
    loaded = (AutoModelForMaskedLM if name not in ARCHITECTURES else ARCHITECTURES[name].head).from_pretrained(
        tmp_path
    )
    assert not sparse_layers(loaded)
    torch.testing.assert_close(outputs(loaded), expected)


def test_unload_gives_the_sparse_model_back():
    model = with_adapter()
    assert torch.equal(outputs(model.unload()), outputs(sparse_model()))


def test_adapters_through_transformers(tmp_path):
    pytest.importorskip("peft", minversion=MIN_PEFT_VERSION)  # 5.24 asks for one that is not out yet
    model = sparse_model()
    model.add_adapter(lora())
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "config.json").exists()  # the adapter only
    assert (tmp_path / "adapter_model.safetensors").exists()


def test_adapters_have_the_dtype_of_the_layer():
    model = get_peft_model(sparse_model().bfloat16(), lora(), autocast_adapter_dtype=False)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(("name", "layer"), [("roberta", "SparseLinear"), ("dynsparse_bert", "BlockSparseLinear")])
def test_without_registration_peft_says_what_the_page_says(name, layer):
    page = (Path(__file__).parents[2] / "docs" / "finetuning.md").read_text(encoding="utf-8")
    told = "is not supported. Currently, only the following modules are supported: `torch.nn.Linear`"
    assert f") {told}" in page
    with pytest.raises(ValueError, match=rf"^Target module {layer}\(in_features=.*\) {told}"):
        get_peft_model(sparse_model(name), LoraConfig(target_modules=["query"]))
    unregistered = get_peft_model(sparse_model(name), LoraConfig(target_modules="all-linear"))
    assert not any("lora_" in key and "layer." in key for key in unregistered.state_dict())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"target_modules": "all-linear"}, r"Got \"all-linear\".*`list\(sparse_layers\(model\)\)`"),
        ({"init_lora_weights": "pissa"}, "`init_lora_weights` must be one of"),
        ({"init_lora_weights": "orthogonal"}, "`init_lora_weights` must be one of"),
        ({"use_dora": True}, "unsupported variant combination"),
    ],
)
def test_what_needs_a_dense_weight_is_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        get_peft_model(sparse_model(), lora(**{"target_modules": ["query"], **overrides}))


def test_every_sparse_layer_by_name():
    model = sparse_model()
    adapted = get_peft_model(model, lora(target_modules=list(sparse_layers(model))))
    assert sum(isinstance(module, BlockSparseLora) for module in adapted.modules()) == 12
