"""Quantisation-aware training: what becomes of a model, its checkpoints, and its topology."""

import copy
import logging
import math
import zlib

import pytest
import torch
from torch import distributed, nn
from torch.multiprocessing import start_processes
from toy import toy_arguments, toy_batch, toy_model, toy_trainer
from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification, BertConfig, BertForMaskedLM

from hf_dynsparse import (
    BlockSparseLinear,
    DynSparseBertForSequenceClassification,
    DynSparseTrainer,
    densify_,
    prepare_qat_,
    slim,
    sparse_layers,
    sparsify_,
    to_int8_,
)
from hf_dynsparse.compress.int8.affine import fake_quantize_weight, weight_scale
from hf_dynsparse.compress.int8.qat import QatBlockSparseLinear, QatEmbedding, QatLinear, QatSparseLinear
from hf_dynsparse.compress.slimming import add_gates_


def classifier(**overrides):
    return toy_model(cls=DynSparseBertForSequenceClassification, num_labels=2, **overrides)


def stock_bert():
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return BertForMaskedLM(BertConfig(vocab_size=64, max_position_embeddings=32, **sizes))


def hash_of_indices(model):
    indices = [layer.block_index.sort().values for layer in sparse_layers(model).values()]
    return zlib.crc32(torch.cat(indices).numpy().tobytes())


def examples(count=24):
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 64, (count, 12), generator=draw)
    return [{"input_ids": row, "labels": int(row[1] > 30)} for row in ids]


def qat_trainer(folder, model, **overrides):
    settings = {"num_topology_updates": 0, "learning_rate": 1e-3, "max_steps": 6, **overrides}
    return DynSparseTrainer(model, toy_arguments(folder, **settings), train_dataset=examples())


def test_parameters_and_names_stay():
    model = classifier()
    parameters, modules = dict(model.named_parameters()), dict(model.named_modules())
    assert prepare_qat_(model) is model
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert all(module is modules[name] for name, module in model.named_modules())  # hooks and holders notice nothing
    added = set(model.state_dict()) - set(classifier().state_dict())
    assert {name.rpartition(".")[2] for name in added} == {"input_range"}
    kinds = [type(module) for module in model.modules()]
    assert kinds.count(QatBlockSparseLinear) == 12
    assert kinds.count(QatLinear) == 2  # pooler and classifier
    assert nn.Linear not in kinds
    assert BlockSparseLinear not in kinds


def test_a_tied_decoder_stays_in_floating_point(caplog):
    model = toy_model()
    with caplog.at_level(logging.INFO, "hf_dynsparse"):
        prepare_qat_(model)
    assert type(model.cls.predictions.decoder) is nn.Linear
    assert [record.message for record in caplog.records] == [
        "cls.predictions.decoder stays in floating point: its weight is that of an embedding."
    ]
    with pytest.raises(ValueError, match="only if no output layer shares them. Got cls.predictions.decoder"):
        prepare_qat_(toy_model(), embeddings=True)


def test_nothing_to_prepare_is_an_error():
    with pytest.raises(ValueError, match="it is prepared, or quantised, already"):
        prepare_qat_(prepare_qat_(classifier()))
    with pytest.raises(ValueError, match="call `prepare_qat_` and train it"):
        to_int8_(classifier())
    with pytest.raises(ValueError, match="`bert.encoder.layer.0.attention.self.query`, which has seen no batch"):
        to_int8_(prepare_qat_(classifier()))


def test_slimming_and_gates_come_before(tmp_path):
    model = prepare_qat_(classifier(sparsity=0.0))
    with pytest.raises(ValueError, match=r"`slim` must get a model in floating point.*QatLinear. Slim first"):
        slim(model, [range(1)] * 2, [range(8)] * 2)
    with pytest.raises(ValueError, match="Got one with QatLinear"):
        add_gates_(model)
    slimmed = slim(classifier(sparsity=0.0), [range(1)] * 2, [range(8)] * 2)
    prepare_qat_(slimmed).train()(input_ids=torch.tensor([[7, 9]]))
    to_int8_(slimmed).save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert loaded.bert.encoder.layer[1].output.dense.int8_values.shape == (32, 8)
    assert torch.equal(loaded(torch.tensor([[7, 9]])).logits, slimmed(torch.tensor([[7, 9]])).logits)


def test_the_range_is_a_moving_average_of_training_batches():
    layer = prepare_qat_(nn.Sequential(nn.Linear(2, 2)))[0]
    assert layer.input_range.tolist() == [math.inf, -math.inf]
    layer.eval()(torch.tensor([[-9.0, 9.0]]))
    assert not layer.is_ready  # evaluation leaves no trace
    layer.train()(torch.tensor([[-1.0, 2.0]]))
    assert layer.input_range.tolist() == [-1.0, 2.0]
    layer(torch.tensor([[-2.0, 1.0]]))
    torch.testing.assert_close(layer.input_range, torch.tensor([-1.01, 1.99]))
    layer.eval()(torch.tensor([[-9.0, 9.0]]))
    torch.testing.assert_close(layer.input_range, torch.tensor([-1.01, 1.99]))


def test_a_cast_leaves_the_range_alone():
    layer = prepare_qat_(nn.Sequential(nn.Linear(2, 2)))[0].to(torch.bfloat16)
    layer.train()(torch.tensor([[-1.0, 2.0]], dtype=torch.bfloat16))
    layer(torch.tensor([[-2.0, 1.0]], dtype=torch.bfloat16))
    torch.testing.assert_close(layer.to(torch.bfloat16).input_range, torch.tensor([-1.01, 1.99]))


def test_weights_are_rounded_from_the_first_step_and_learn_as_if_they_were_not():
    layer = prepare_qat_(nn.Sequential(nn.Linear(8, 4)))[0].train()
    input = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))
    layer(input).sum().backward()
    rounded = fake_quantize_weight(layer.weight.detach(), weight_scale(layer.weight))
    assert not torch.equal(rounded, layer.weight)
    scale = (input.max() - input.min()) / 255
    torch.testing.assert_close(layer(input), input @ rounded.T + layer.bias, rtol=0, atol=8 * scale.item())
    torch.testing.assert_close(layer.weight.grad, input.sum(0).expand(4, 8), rtol=0, atol=16 * scale.item())


def test_word_embeddings_on_request():
    model = prepare_qat_(classifier(), embeddings=True)
    words = model.bert.embeddings.word_embeddings
    assert type(words) is QatEmbedding
    ids = torch.tensor([[7, 9]])
    scale = weight_scale(words.weight)
    torch.testing.assert_close(words(ids), (words.weight / scale).round()[ids] * scale)
    words(ids).sum().backward()
    assert words.weight.grad.sum(1).tolist()[5:11] == [0.0, 0.0, 32.0, 0.0, 32.0, 0.0]


def test_it_learns_and_the_topology_stays(tmp_path):
    model = prepare_qat_(classifier())
    before = hash_of_indices(model)
    trainer = qat_trainer(tmp_path, model, max_steps=24, learning_rate=1e-2)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert sum(losses[-6:]) < 0.7 * sum(losses[:6])
    assert hash_of_indices(model) == before
    trainer.save_model()
    assert hash_of_indices(AutoModelForSequenceClassification.from_pretrained(tmp_path)) == before
    assert hash_of_indices(to_int8_(model)) == before
    model.save_pretrained(tmp_path / "int8")
    assert hash_of_indices(AutoModelForSequenceClassification.from_pretrained(tmp_path / "int8")) == before


def test_a_half_way_checkpoint_is_a_model_in_floating_point(tmp_path):
    model = prepare_qat_(classifier())
    qat_trainer(tmp_path, model).train()
    model.save_pretrained(tmp_path)
    loaded, info = AutoModelForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert type(loaded.classifier) is nn.Linear
    state = model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.state_dict().items())
    dense = model.to_dense()  # without the ranges too
    assert type(dense.classifier) is nn.Linear


def test_the_same_for_a_sparse_stock_model(tmp_path):
    model = prepare_qat_(sparsify_(stock_bert(), block_size=(1, 4), sparsity=0.75))
    assert sum(isinstance(module, QatSparseLinear) for module in model.modules()) == 12
    model.train()(**toy_batch()).loss.backward()
    model.save_pretrained(tmp_path)
    loaded, info = AutoModelForMaskedLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert hash_of_indices(loaded) == hash_of_indices(model)
    assert type(loaded.cls.predictions.transform.dense) is nn.Linear
    densify_(model)


def test_pretraining_goes_on_quantisation_aware_too(tmp_path):
    model = prepare_qat_(toy_model())
    toy_trainer(tmp_path, model, num_topology_updates=0, max_steps=2).train()
    rounded = copy.deepcopy(model).eval()
    int8 = to_int8_(model)
    with torch.no_grad():
        torch.testing.assert_close(int8(**toy_batch()).logits, rounded(**toy_batch()).logits, rtol=0, atol=1e-3)


def test_ranks_agree_about_the_range(tmp_path):
    start_processes(range_of_a_rank, (tmp_path,), nprocs=2, start_method="fork")
    ranges = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    # Rank 0 saw [-1, 2], rank 1 [-3, 0]; then [-2, 4] and [-6, 0].
    torch.testing.assert_close(ranges[0], torch.tensor([-3.03, 2.02]))
    assert torch.equal(*ranges)


def range_of_a_rank(rank, folder):
    torch.set_num_threads(1)
    store = distributed.FileStore(str(folder / "store"), 2)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    layer = prepare_qat_(nn.Sequential(nn.Linear(2, 2)))[0]
    input = torch.tensor([[-1.0, 2.0], [-3.0, 0.0]])[[rank]]
    layer(input)
    layer(2 * input)
    torch.save(layer.input_range, folder / f"{rank}.pt")
    distributed.destroy_process_group()
