"""Sparse layers in stock transformers models: what becomes sparse, and that it trains, saves and loads as usual."""

import copy
import json
import pickle
import subprocess
import sys
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from toy import toy_arguments, toy_collator, toy_examples, toy_model, toy_tokenizer
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForPreTraining,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    CTRLConfig,
    DataCollatorForLanguageModeling,
    DistilBertConfig,
    ElectraConfig,
    FunnelConfig,
    GPT2Config,
    HrmTextConfig,
    LlamaConfig,
    ModernBertConfig,
    RadioConfig,
    RobertaConfig,
    RobertaForMaskedLM,
    T5Config,
)
from transformers.pytorch_utils import Conv1D

from hf_dynsparse import (
    BlockSparseLinear,
    DynSparseBertForMaskedLM,
    DynSparseQuantizationConfig,
    DynSparseTrainer,
    densify_,
    flops_per_sequence,
    sparse_layers,
    sparsify_,
)
from hf_dynsparse.models.stock.layers import SparseConv1D
from hf_dynsparse.nn.replace import replace_by_dense_


class Architecture(NamedTuple):
    config: Any
    head: Any
    sparse: int  # layers
    dense: set[str]  # linear layers that stay dense


SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 40,
}
TOKENS: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
TRAINED = {
    "roberta": Architecture(RobertaConfig(**SIZES), AutoModelForMaskedLM, 12, {"lm_head.dense", "lm_head.decoder"}),
    "distilbert": Architecture(
        DistilBertConfig(vocab_size=64, dim=32, hidden_dim=64, n_layers=2, n_heads=2, max_position_embeddings=40),
        AutoModelForMaskedLM,
        12,
        {"vocab_transform", "vocab_projector"},
    ),
    "electra": Architecture(
        ElectraConfig(**SIZES, embedding_size=16),
        AutoModelForMaskedLM,
        12,
        {"electra.embeddings_project", "generator_predictions.dense", "generator_lm_head"},
    ),
    "modernbert": Architecture(
        ModernBertConfig(**SIZES, **TOKENS, cls_token_id=1, sep_token_id=2),
        AutoModelForMaskedLM,
        8,
        {"head.dense", "decoder"},
    ),
    "llama": Architecture(LlamaConfig(**SIZES, num_key_value_heads=1), AutoModelForCausalLM, 14, {"lm_head"}),
    "gpt2": Architecture(
        GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=40, **TOKENS),
        AutoModelForCausalLM,
        8,
        {"lm_head"},
    ),
}
ARCHITECTURES = TRAINED | {
    # A discriminator has another head than a generator.
    "electra discriminator": Architecture(
        ElectraConfig(**SIZES, embedding_size=32),
        AutoModelForPreTraining,
        12,
        {"discriminator_predictions.dense", "discriminator_predictions.dense_prediction"},
    ),
    # Two stacks, no base model, and a forward that asks for the dtype of `wo.weight`.
    "t5": Architecture(
        T5Config(vocab_size=64, d_model=32, d_ff=64, d_kv=16, num_layers=2, num_heads=2, decoder_start_token_id=0),
        AutoModelForSeq2SeqLM,
        32,
        {"lm_head"},
    ),
    # Projections that are fused in a dense checkpoint.
    "hrm": Architecture(
        HrmTextConfig(**SIZES, num_key_value_heads=2, head_dim=16), AutoModelForCausalLM, 32, {"lm_head"}
    ),
    # Attention whose name holds "head".
    "ctrl": Architecture(
        CTRLConfig(vocab_size=64, n_embd=32, dff=64, n_layer=2, n_head=2, n_positions=40),
        AutoModelForCausalLM,
        12,
        {"lm_head"},
    ),
    # Projections whose name holds "head", and an initialisation that asks for the shape of every weight.
    "funnel": Architecture(
        FunnelConfig(
            vocab_size=64, block_sizes=[1, 1], d_model=32, n_head=2, d_head=16, d_inner=64, num_decoder_layers=1
        ),
        AutoModelForMaskedLM,
        18,
        {"lm_head"},
    ),
}
HOW = {"block_size": 8, "sparsity": 0.75}


def build(name: str = "roberta", seed: int = 0) -> Any:
    """A dense toy model, in evaluation mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ARCHITECTURES[name].head.from_config(copy.deepcopy(ARCHITECTURES[name].config)).eval()


def outputs(model: Any) -> torch.Tensor:
    """Logits or hidden states of a fixed batch."""
    ids = torch.randint(5, 64, (2, 12), generator=torch.Generator().manual_seed(1))
    decoder = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model.eval()(input_ids=ids, **decoder)[0]


def body(model: Any) -> dict[str, torch.Tensor]:
    """State of the sparse layers, by the names that they have in the base model."""
    prefix = f"{model.base_model_prefix}."
    return {
        f"{name.removeprefix(prefix)}.{key}": tensor
        for name, layer in sparse_layers(model).items()
        for key, tensor in layer.state_dict().items()
    }


def assert_equal_states(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype
        assert torch.equal(tensor, other[name]), name


def trainer_of(model: Any, folder: Any, **overrides: Any) -> DynSparseTrainer:
    causal = "CausalLM" in type(model).__name__ or "LMHead" in type(model).__name__
    return DynSparseTrainer(
        model,
        toy_arguments(folder, **{"max_steps": 6, "num_topology_updates": 2, **overrides}),
        data_collator=DataCollatorForLanguageModeling(toy_tokenizer(), mlm=False) if causal else toy_collator(),
        train_dataset=toy_examples(24),
    )


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_heads_stay_dense(name):
    model = sparsify_(build(name), **HOW)
    dense = {name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    assert dense == ARCHITECTURES[name].dense
    assert len(sparse_layers(model)) == ARCHITECTURES[name].sparse


def test_heads_become_sparse_on_request_but_tied_weights_never():
    model = sparsify_(build(), **HOW, ignore=())
    assert {name for name, module in model.named_modules() if isinstance(module, nn.Linear)} == {"lm_head.decoder"}
    assert model.lm_head.decoder.weight is model.roberta.embeddings.word_embeddings.weight


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_dense_checkpoint_is_made_sparse_on_its_way_in(name, tmp_path):
    dense = build(name)
    dense.save_pretrained(tmp_path)
    how = DynSparseQuantizationConfig(**HOW)
    model, info = ARCHITECTURES[name].head.from_pretrained(tmp_path, quantization_config=how, output_loading_info=True)
    assert not any(info.values())  # nothing missing, nothing left over
    assert how.nnzb is None  # the user's own object serves again
    assert torch.equal(outputs(model), outputs(sparsify_(build(name), **HOW)))
    for key, layer in sparse_layers(model).items():
        weight = dense.get_submodule(key).weight.detach()
        linear = nn.Linear(layer.in_features, layer.out_features, bias=False)
        linear.weight = nn.Parameter(weight.T if isinstance(layer, SparseConv1D) else weight)
        kept = BlockSparseLinear.from_dense(linear, **HOW)
        assert torch.equal(layer.block_index, kept.block_index)
        assert torch.equal(layer.values, kept.values)


@pytest.mark.parametrize("name", ["roberta", "llama", "gpt2"])
def test_train_save_load(name, tmp_path):
    model = sparsify_(build(name), **HOW)
    before = {key: layer.block_index.clone() for key, layer in sparse_layers(model).items()}
    trainer = trainer_of(model, tmp_path / "run")
    trainer.train()
    assert trainer.topology.metrics["topology_updates"] == 2
    changed = [not torch.equal(layer.block_index, before[key]) for key, layer in sparse_layers(model).items()]
    assert sum(changed) > len(changed) // 2  # two blocks of eight may find back to where they were
    trainer.save_model(tmp_path / "head")

    head, info = ARCHITECTURES[name].head.from_pretrained(tmp_path / "head", output_loading_info=True)
    assert not any(info.values())
    assert_equal_states(model.state_dict(), head.state_dict())
    assert torch.equal(outputs(head), outputs(model))

    other, info = AutoModelForSequenceClassification.from_pretrained(tmp_path / "head", output_loading_info=True)
    assert info["missing_keys"]
    assert not any("values" in key or "block_index" in key for keys in info.values() for key in keys)
    assert_equal_states(body(model), body(other))

    bare, info = AutoModel.from_pretrained(tmp_path / "head", output_loading_info=True)
    assert not any(key.endswith(("values", "block_index")) for key in info["unexpected_keys"])
    assert_equal_states(body(model), body(bare))
    bare.save_pretrained(tmp_path / "bare")
    again, info = ARCHITECTURES[name].head.from_pretrained(tmp_path / "bare", output_loading_info=True)
    assert not any(key for key in info["unexpected_keys"] if "pooler" not in key)
    assert_equal_states(body(model), body(again))


@pytest.mark.parametrize("name", sorted(ARCHITECTURES.keys() - {"roberta", "llama", "gpt2"}))
def test_save_load(name, tmp_path):
    model = sparsify_(build(name), **HOW)
    model.save_pretrained(tmp_path)
    loaded, info = ARCHITECTURES[name].head.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(outputs(loaded), outputs(model))


def test_names_of_other_formats_are_left_alone(tmp_path):
    # A dense RADIO is saved with query, key and value fused, by a rule that takes any tensor for a weight.
    config = RadioConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    model = sparsify_(AutoModel.from_config(config), **HOW, targets=["*.q_proj"])
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert_equal_states(model.state_dict(), loaded.state_dict())


def test_a_resumed_run_is_the_undisturbed_one(tmp_path):
    name = "gpt2"  # whose layers are stored in another order
    settings = {"save_strategy": "steps", "save_steps": 3, "num_topology_updates": 2}
    straight = trainer_of(sparsify_(build(name), **HOW), tmp_path, **settings)
    straight.train()
    checkpoint = tmp_path / "checkpoint-3"
    resumed = trainer_of(sparsify_(build(name, seed=7), **HOW), tmp_path, **settings)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert_equal_states(straight.model.state_dict(), resumed.model.state_dict())
    # What training records about exploration is no news to who loads a checkpoint.
    loaded, info = ARCHITECTURES[name].head.from_pretrained(checkpoint, output_loading_info=True)
    assert not any(info.values())
    fresh = trainer_of(loaded, tmp_path / "other")
    assert fresh.topology is not None


def test_offloading_to_disk(tmp_path):
    dense, sparse = build(), sparsify_(build(), **HOW)
    dense.save_pretrained(tmp_path / "dense")
    sparse.save_pretrained(tmp_path / "sparse")
    places = {"roberta.embeddings": "cpu", "roberta.encoder": "disk", "lm_head": "cpu"}
    offload = {"device_map": places, "offload_folder": tmp_path / "offload"}
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path / "sparse", **offload)
    assert torch.equal(outputs(loaded), outputs(sparse))
    with pytest.raises(ValueError, match="must stand on one device to be made sparse"):
        AutoModelForMaskedLM.from_pretrained(
            tmp_path / "dense", quantization_config=DynSparseQuantizationConfig(**HOW), **offload
        )


def test_low_precision_leaves_the_index_alone(tmp_path):
    model = sparsify_(build(), **HOW)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for name, layer in sparse_layers(loaded).items():
        assert layer.values.dtype == layer.bias.dtype == torch.bfloat16
        assert layer.block_index.dtype == torch.int32
        assert torch.equal(layer.block_index, sparse_layers(model)[name].block_index)
    # Nothing is quantised: a cast is allowed.
    assert next(iter(sparse_layers(loaded.float()).values())).values.dtype == torch.float32


def test_rectangular_blocks_and_erk(tmp_path):
    model = sparsify_(build(), (2, 8), 0.75, distribution="erk", targets=["*.layer.1.*"])
    assert len(sparse_layers(model)) == 6
    model.save_pretrained(tmp_path)
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path)
    assert torch.equal(outputs(loaded), outputs(model))
    assert loaded.config.quantization_config.block_shape == (2, 8)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_save_and_load_too(duplicate, tmp_path):
    model = sparsify_(build("gpt2"), **HOW)
    copied = duplicate(model)
    copied.save_pretrained(tmp_path)
    assert torch.equal(outputs(AutoModelForCausalLM.from_pretrained(tmp_path)), outputs(model))
    # As a resumed run loads it.
    assert not model.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False).unexpected_keys


def test_the_configuration_of_a_model_in_memory_serves_again(tmp_path):
    model = sparsify_(build(), **HOW)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path, config=model.config)
    assert torch.equal(outputs(loaded), outputs(model))


@pytest.mark.parametrize(
    ("name", "way"),
    [
        ("roberta", densify_),
        ("gpt2", replace_by_dense_),
        ("funnel", lambda model: model.dequantize()),
        ("gpt2", densify_),
    ],
)
def test_back_to_a_stock_model(name, way, tmp_path):
    model = sparsify_(build(name), **HOW)
    sparse = outputs(model)
    way(model)
    torch.testing.assert_close(outputs(model), sparse)
    assert {type(module) for module in model.modules()} == {type(module) for module in build(name).modules()}
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    stock = ARCHITECTURES[name].head.from_pretrained(tmp_path)
    assert not sparse_layers(stock)
    assert torch.equal(outputs(stock), outputs(model))
    assert stock.state_dict().keys() == build(name).state_dict().keys()


def test_a_second_call_adds_layers(tmp_path):
    model = sparsify_(build(), **HOW, targets=["*attention*"])
    sparsify_(model, 8, 0.5, targets=["*.intermediate.dense"])
    assert len(sparse_layers(model)) == 10
    model.save_pretrained(tmp_path)
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path)
    assert torch.equal(outputs(loaded), outputs(model))
    with pytest.raises(ValueError, match=r"blocks of one size. Got \(4, 4\) for a model with \(8, 8\) in"):
        sparsify_(loaded, 4)
    assert len(sparse_layers(loaded)) == 10
    densify_(loaded)
    assert not hasattr(loaded.config, "quantization_config")


def test_a_conv1d_becomes_sparse_and_dense_again():
    conv = Conv1D(24, 16)
    with torch.no_grad():
        conv.bias.normal_()
    layer = SparseConv1D.from_dense(conv, 8, 0.0)
    assert layer.shape == (24, 16)
    assert torch.equal(layer.to_dense(), conv.weight.T)
    back = layer.to_linear()
    assert type(back) is Conv1D
    assert torch.equal(back.weight, conv.weight)
    input = torch.randn(2, 16)
    torch.testing.assert_close(layer(input), conv(input))
    torch.testing.assert_close(back(input), conv(input))


def test_nobody_computes_with_the_stand_in_for_a_weight():
    layer = next(iter(sparse_layers(sparsify_(build(), **HOW)).values()))
    assert (layer.weight.shape, layer.weight.dtype, layer.weight.device) == (
        (32, 32),
        layer.values.dtype,
        layer.values.device,
    )
    assert nn.functional.linear(torch.zeros(1, 32), layer.weight).isnan().all()


# What `from_config` and an empty state do.


def test_a_fresh_model_is_initialised(tmp_path):
    torch.manual_seed(0)
    model = RobertaForMaskedLM.from_pretrained(
        None,
        config=copy.deepcopy(TRAINED["roberta"].config),
        state_dict={},
        quantization_config=DynSparseQuantizationConfig(**HOW),
    )
    for layer in sparse_layers(model).values():
        assert 0.015 < layer.values.std() < 0.03  # of the largest blocks
        assert not layer.bias.any()


def test_from_config_builds_a_dense_model_that_can_be_made_sparse(tmp_path):
    sparsify_(build(), **HOW).save_pretrained(tmp_path / "sparse")
    config = AutoConfig.from_pretrained(tmp_path / "sparse")
    dense = AutoModelForMaskedLM.from_config(config)
    assert not sparse_layers(dense)
    # Saved like this its configuration is wrong, and that is said.
    dense.save_pretrained(tmp_path / "wrong")
    with pytest.raises(ValueError, match=r"without `roberta.*\.values` and 23 more. .* remove `quantization_config`"):
        AutoModelForMaskedLM.from_pretrained(tmp_path / "wrong")
    sparsify_(dense, **HOW).save_pretrained(tmp_path / "right")
    assert torch.equal(outputs(AutoModelForMaskedLM.from_pretrained(tmp_path / "right")), outputs(dense))
    with pytest.raises(ValueError, match=r"Got the given `state_dict` without `roberta"):
        RobertaForMaskedLM.from_pretrained(None, config=config, state_dict={})


# Refusals.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"targets": ["*.none.*"]}, r"At least one linear layer of RobertaForMaskedLM .* roberta.encoder.layer.0"),
        ({"block_size": 5}, r"must divide both sides of `roberta.* Or leave layers out by `targets` or `ignore`"),
        ({"sparsity": 1.0}, r"must lie in \[0, 1\). Got 1.0"),
        ({"distribution": "normal"}, "`distribution` must be one of"),
        ({"block_size": 0}, "must be a positive integer or a pair"),
    ],
)
def test_a_refused_model_is_untouched(arguments, message):
    model = build()
    before = outputs(model)
    with pytest.raises(ValueError, match=message):
        sparsify_(model, **{**HOW, **arguments})
    assert not sparse_layers(model)
    assert not hasattr(model, "hf_quantizer")
    assert not hasattr(model.config, "quantization_config")
    assert torch.equal(outputs(model), before)


def test_without_the_package_loading_is_an_error(tmp_path):
    sparsify_(build(), **HOW).save_pretrained(tmp_path / "head")
    AutoModel.from_pretrained(tmp_path / "head").save_pretrained(tmp_path / "bare")
    script = """
import sys
sys.modules["hf_dynsparse"] = None
from transformers import AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification
for folder in sys.argv[1:]:
    for cls in (AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification):
        try:
            cls.from_pretrained(folder)
        except RuntimeError as error:
            assert "ignore_mismatched_sizes" in str(error), error
        else:
            raise AssertionError(f"{cls.__name__} was loaded with random weights")
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "head"), str(tmp_path / "bare")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Unknown quantization type, got dynsparse" in done.stderr


@pytest.mark.parametrize(
    "calls",
    [
        [{"sparsity": 0.75}],
        [{"sparsity": 0.75, "distribution": "erk"}],
        [{"sparsity": 0.0}],  # all blocks, stored as blocks
        [{"sparsity": 0.75, "targets": ["*.query"]}],
        [{"sparsity": 0.75, "targets": ["*attention*"]}, {"sparsity": 0.5}],
    ],
)
def test_a_dynsparse_bert_notes_it_in_its_own_configuration(calls, tmp_path):
    model = toy_model(sparsity=0.0)
    for arguments in calls:
        sparsify_(model, (2, 4), **arguments)
    assert not hasattr(model, "hf_quantizer")
    assert {type(layer) for layer in sparse_layers(model).values()} == {BlockSparseLinear}
    assert (model.config.nnzb is None) == ("targets" not in calls[0] and calls[0]["sparsity"] > 0)
    assert model.config.num_active_entries() == sum(
        layer.values.numel() if isinstance(layer, BlockSparseLinear) else layer.weight.numel()
        for layer in model.bert.encoder.modules()
        if isinstance(layer, nn.Linear | BlockSparseLinear)
    )
    model.save_pretrained(tmp_path)
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path)
    assert type(loaded) is DynSparseBertForMaskedLM
    assert_equal_states(model.state_dict(), loaded.state_dict())


def test_a_dynsparse_bert_is_no_stock_model(tmp_path):
    model = toy_model(sparsity=0.0)
    with pytest.raises(ValueError, match="Only the encoder of a DynSparse BERT can be sparse. Got `cls.predictions"):
        sparsify_(model, 4, ignore=())
    assert not sparse_layers(model)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="whose own configuration says how sparse it is"):
        AutoModelForMaskedLM.from_pretrained(tmp_path, quantization_config=DynSparseQuantizationConfig(**HOW))


@pytest.mark.parametrize("name", [*TRAINED, "electra discriminator"])
def test_flops_count_the_body(name):
    # Two layers, T = 12: attention 4 matrices of 32 x 32 and QK^T, AV; feed-forward 2 or 3 matrices of 64 x 32.
    entries = {"llama": 3 * 1024 + 3 * 2048, "modernbert": 4 * 1024 + 3 * 2048, "gpt2": 4 * 1024 + 2 * 4096}
    nnz = 2 * entries.get(name, 4 * 1024 + 2 * 2048)
    model = build(name)
    assert flops_per_sequence(model, 12) == 3 * (2 * 12 * nnz + 4 * 12**2 * 32 * 2)
    sparsify_(model, **HOW)
    assert flops_per_sequence(model, 12) == 3 * (2 * 12 * nnz // 4 + 4 * 12**2 * 32 * 2)
