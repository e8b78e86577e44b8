"""Encoders of any architecture that are sparse from the first moment, and their presets."""

import copy
from math import prod

import pytest
import torch
from test_stock import ARCHITECTURES, HOW, outputs, trainer_of
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForMaskedLM

from hf_dynsparse import estimate_run, flops_per_sequence, sparse_from_config, sparse_layers
from hf_dynsparse.models.flops import dense_flops_per_sequence
from hf_dynsparse.models.presets import encoder_preset, preset_on_meta, tell_vocabulary_
from hf_dynsparse.reports.facts import checkpoint_bytes
from hf_dynsparse.reports.layers import model_facts
from tests.toy import toy_config, toy_tokenizer


ENCODERS = ("modernbert", "roberta", "electra", "distilbert", "funnel")


class Allocated(TorchDispatchMode):
    """Tensors of `shapes` that are made off the meta device."""

    def __init__(self, shapes):
        super().__init__()
        self.shapes, self.made = set(shapes), []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and not result.is_meta and tuple(result.size()) in self.shapes:
            self.made.append((func, result.size()))
        return result


def fresh(name, seed=0, **how):
    config = copy.deepcopy(ARCHITECTURES[name].config)
    for dropout in [field for field in config.to_dict() if "dropout" in field and field != "classifier_dropout"]:
        setattr(config, dropout, 0.0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return sparse_from_config(ARCHITECTURES[name].head, config, **{**HOW, **how})


@pytest.mark.parametrize("name", ENCODERS)
def test_a_fresh_model(name, tmp_path):
    dense = ARCHITECTURES[name].head.from_config(copy.deepcopy(ARCHITECTURES[name].config))
    shapes = {layer: dense.get_submodule(layer).weight.shape for layer in sparse_layers(fresh(name))}
    head = {tuple(p.shape) for key, p in dense.named_parameters() if key.removesuffix(".weight") not in shapes}
    with Allocated({tuple(shape) for shape in shapes.values()} - head) as seen:
        model = fresh(name, block_size=4)
    assert not seen.made
    assert len(shapes) == ARCHITECTURES[name].sparse

    drawn = {key: layer.values for key, layer in sparse_layers(model).items()}
    for key, values in drawn.items():
        std = float(dense.get_submodule(key).weight.detach().std())
        assert float(values.detach().std()) == pytest.approx(std, rel=0.25), key
    for key, tensor in dense.state_dict().items():
        if not any(key.startswith(f"{layer}.") for layer in shapes) and tensor.is_floating_point():
            std, five_sigma = float(tensor.std(correction=0)), 5 / tensor.numel() ** 0.5  # of two draws
            assert float(model.state_dict()[key].std(correction=0)) == pytest.approx(std, rel=five_sigma), key
    for key, buffer in dense.named_buffers():
        assert torch.equal(buffer, model.get_buffer(key)), key

    again, other = fresh(name, block_size=4), fresh(name, seed=1, block_size=4)
    for key, layer in sparse_layers(model).items():
        assert torch.equal(layer.block_index, sparse_layers(again)[key].block_index)
        assert torch.equal(layer.values, sparse_layers(again)[key].values)
        assert not torch.equal(layer.block_index, sparse_layers(other)[key].block_index)

    model.save_pretrained(tmp_path)
    assert torch.equal(outputs(ARCHITECTURES[name].head.from_pretrained(tmp_path)), outputs(model))
    assert checkpoint_bytes(tmp_path) == model_facts(model).bytes
    assert sum(layer.nnz for layer in model_facts(model).layers) == 0.25 * sum(map(prod, shapes.values()))


@pytest.mark.parametrize("name", ["modernbert", "roberta"])
def test_splitting_a_batch_changes_nothing(name, tmp_path):
    trained = []
    for size in ({"per_device_train_batch_size": 4}, {"gradient_accumulation_steps": 4}):
        whole = {"per_device_train_batch_size": 1, "max_steps": 2, "num_topology_updates": 1, "max_grad_norm": 0.0}
        trainer = trainer_of(fresh(name), tmp_path, **{**whole, **size})
        rows = []
        head = trainer.model.get_output_embeddings()
        head.register_forward_hook(lambda *call, rows=rows: rows.append(call[2].shape))
        trainer.train()
        assert all(len(shape) == 2 and shape[0] < 64 for shape in rows)  # labelled positions only
        trained.append(trainer.model.state_dict())
    for key, tensor in trained[0].items():
        torch.testing.assert_close(tensor, trained[1][key], atol=1e-5, rtol=0)


def test_flops_by_hand():
    # Fused projections of 3 x 32 rows; gated units of 2 x 64. Two layers, T = 12.
    entries = 2 * (96 * 32 + 32 * 32 + 128 * 32 + 32 * 64)
    attention = 4 * 12**2 * 32 * 2
    model = fresh("modernbert")
    assert flops_per_sequence(model, 12) == 3 * (2 * 12 * entries // 4 + attention)
    assert dense_flops_per_sequence(model, 12) == 3 * (2 * 12 * entries + attention)
    with torch.device("meta"):
        assert estimate_run(fresh("modernbert"), seq_len=12).flops == flops_per_sequence(model, 12)


@pytest.mark.parametrize(
    ("model_type", "sizes"),
    [
        ("modernbert", [(3 * 256, 256), (256, 256), (2 * 688, 256), (256, 688)]),
        ("roberta", [(256, 256), (1024, 256), (256, 1024)]),
        ("electra", [(256, 256), (1024, 256), (256, 1024)]),
        ("distilbert", [(256, 256), (1024, 256), (256, 1024)]),
    ],
)
def test_presets(model_type, sizes):
    model = preset_on_meta(model_type, "mini", 8192, sparsity=0.75, block_size=16)
    assert list(dict.fromkeys(layer.shape for layer in sparse_layers(model).values())) == sizes
    assert model.config.num_hidden_layers == 4
    assert model.get_input_embeddings().weight.shape == (8192, 256)


def test_a_preset_of_modernbert():
    config = encoder_preset("modernbert", "small", 32, "num_hidden_layers=5,initializer_range=0.03")
    assert (config.intermediate_size, config.initializer_range, config.sparse_prediction) == (1376, 0.03, True)
    assert len(config.layer_types) == 5
    assert encoder_preset("modernbert", "mini").initializer_range == 1 / 16
    tell_vocabulary_(config, toy_tokenizer())
    assert (config.vocab_size, config.pad_token_id, config.bos_token_id, config.sep_token_id) == (64, 0, 2, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nonsense", "mini"), "`--model_type` must be an architecture of transformers. Got 'nonsense'"),
        (("gpt2", "mini"), "needs an encoder with a head for it. Got --model_type gpt2"),
        (("bart", "mini"), "needs an encoder with a head for it. Got --model_type bart"),
        (("funnel", "mini"), "which has no num_hidden_layers, intermediate_size"),
        (("roberta", "huge"), "`--preset` must be one of tiny, mini"),
    ],
)
def test_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        encoder_preset(*arguments)


def test_a_bert_of_ours_says_itself_how_sparse_it_is():
    with pytest.raises(ValueError, match="which says itself how sparse its model is"):
        sparse_from_config(AutoModelForMaskedLM, toy_config())
