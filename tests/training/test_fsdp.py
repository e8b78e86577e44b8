"""What a run under FSDP2 asks of accelerate, and what is refused. Two ranks of it: tests/invariants."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore
from toy import toy_model, toy_trainer
from transformers import RobertaConfig, RobertaForMaskedLM, RobertaForSequenceClassification

from hf_dynsparse import DynSparseBertForSequenceClassification, sparsify_
from hf_dynsparse.training.callbacks.refusals import check_parallelism
from hf_dynsparse.training.fsdp import adapt_plugin_, load_weights_, one_name_for_output_bias


def plugin(**settings: Any) -> FullyShardedDataParallelPlugin:
    settings = {"fsdp_version": 2, "state_dict_type": "FULL_STATE_DICT", "cpu_ram_efficient_loading": False} | settings
    return FullyShardedDataParallelPlugin(**settings)


def toy_roberta(cls: type) -> nn.Module:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return sparsify_(cls(RobertaConfig(vocab_size=64, **sizes)), block_size=4, sparsity=0.75)


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (toy_model(), ["BertLayer"]),
        (toy_model(cls=DynSparseBertForSequenceClassification), ["BertLayer"]),
        (toy_roberta(RobertaForMaskedLM), ["RobertaLayer"]),
        (nn.Linear(2, 2), None),
    ],
    ids=lambda value: type(value).__name__,
)
def test_layers_are_sharded_one_by_one(model: nn.Module, expected: list[str] | None) -> None:
    settings = plugin()
    adapt_plugin_(settings, model)
    assert settings.transformer_cls_names_to_wrap == expected


def test_the_choice_of_the_user_stays() -> None:
    settings = plugin(transformer_cls_names_to_wrap=["BertAttention"])
    adapt_plugin_(settings, toy_model())
    assert settings.transformer_cls_names_to_wrap == ["BertAttention"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"state_dict_type": "SHARDED_STATE_DICT"}, "Got SHARDED_STATE_DICT. Set `fsdp_state_dict_type: FULL"),
        ({"cpu_ram_efficient_loading": True}, "Got `fsdp_cpu_ram_efficient_loading: true`. Set it to false"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        adapt_plugin_(plugin(**settings), toy_model())


@pytest.mark.parametrize(
    "model", [toy_model(), toy_roberta(RobertaForMaskedLM)], ids=lambda model: type(model).__name__
)
def test_the_bias_of_the_output_layer_has_one_name_for_a_while(model: nn.Module) -> None:
    names = list(model.state_dict())
    bias = model.get_output_embeddings().bias
    with one_name_for_output_bias(model):
        assert [name for name, x in model.named_parameters(remove_duplicate=False) if x is bias] == [
            name for name in names if name.endswith("decoder.bias")
        ]
    assert list(model.state_dict()) == names
    assert sum(x is bias for _, x in model.named_parameters(remove_duplicate=False)) == 2


@pytest.mark.parametrize(
    "model",
    [toy_model(cls=DynSparseBertForSequenceClassification), toy_roberta(RobertaForSequenceClassification), nn.Tanh()],
    ids=lambda model: type(model).__name__,
)
def test_other_models_keep_all_names(model: nn.Module) -> None:
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    with one_name_for_output_bias(model):
        assert [name for name, _ in model.named_parameters(remove_duplicate=False)] == names


def test_weights_are_loaded_under_all_their_names(tmp_path: Path) -> None:
    source, target = toy_model(seed=1), toy_model(seed=2)
    with torch.no_grad():
        source.get_output_embeddings().bias.fill_(3)
    source.save_pretrained(tmp_path)
    with one_name_for_output_bias(target):
        load_weights_(target, tmp_path)
    for name, tensor in source.state_dict().items():
        assert torch.equal(target.state_dict()[name], tensor), name
    with pytest.raises(FileNotFoundError, match=r"must hold `model.safetensors`\. Got .*empty"):
        load_weights_(target, tmp_path / "empty")


@pytest.mark.parametrize(
    ("kind", "plugin_version", "received"),
    [
        (DistributedType.DEEPSPEED, None, "Got DeepSpeed, which flattens parameters and moments"),
        (DistributedType.FSDP, 1, "Got FSDP1, which flattens parameters"),
    ],
)
def test_other_ways_to_split_a_model_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: DistributedType, plugin_version: int | None, received: str
) -> None:
    trainer = toy_trainer(tmp_path)
    monkeypatch.setattr(PartialState(), "distributed_type", kind)
    monkeypatch.setattr(AcceleratorState(), "fsdp_plugin", SimpleNamespace(fsdp_version=plugin_version), raising=False)
    for begin in (trainer.topology.on_init_end, trainer.topology.on_train_begin):
        with pytest.raises(ValueError, match=rf"by FSDP2 on accelerators .* {received}\. Launch with one of"):
            begin(trainer.args, trainer.state, trainer.control, model=trainer.model, optimizer=None)


def test_fsdp_that_accelerate_leaves_out_is_refused(tmp_path: Path) -> None:
    args = toy_trainer(tmp_path).args
    check_parallelism(args)
    args.fsdp = True
    with pytest.raises(ValueError, match="Got FSDP on CPUs, which accelerate leaves out"):
        check_parallelism(args)


def test_processes_that_would_train_alone_are_refused(tmp_path: Path) -> None:
    args = toy_trainer(tmp_path).args
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        with pytest.raises(ValueError, match=r"must train together\. Got 2 of them, .* Add `--use_cpu`"):
            check_parallelism(args)
    finally:
        torch.distributed.destroy_process_group()
