"""Sentence embeddings and their loss, by hand, and the files that say how they are made."""

import json

import pytest
import torch

from hf_dynsparse import DynSparseBertModel
from hf_dynsparse.checkpoints.sentence_encoder import find_pooling, sentence_files, write_sentence_files
from hf_dynsparse.models.pooling import POOLINGS, pool
from hf_dynsparse.training.sentence_encoders import SentenceDistillation, embedding_loss
from tests.toy import toy_batch, toy_model


def test_pooling_leaves_padding_out():
    states = torch.tensor([[[1.0, -2.0], [3.0, -4.0], [9.0, 9.0]]])
    found = {name: pool(states, torch.tensor([[1, 1, 0]]), name).tolist() for name in POOLINGS}
    assert found == {"mean": [[2.0, -3.0]], "cls": [[1.0, -2.0]], "max": [[3.0, -2.0]]}


def test_the_loss_by_hand():
    student = torch.tensor([[2.0, 0.0], [0.0, 3.0], [3.0, 4.0]])
    teacher = torch.tensor([[1.0, 0.0], [4.0, 0.0], [3.0, 4.0]])
    # The same direction, twice as long; at a right angle, 25 / 16; the same.
    assert embedding_loss(student, teacher).tolist() == pytest.approx([1.0, 1.0 + 25 / 16, 0.0], abs=1e-6)


@torch.no_grad()
def test_the_loss_of_a_batch():
    teacher, batch = toy_model(9, DynSparseBertModel, sparsity=0.0), toy_batch()
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    distillation = SentenceDistillation(teacher, "mean", layers="all")
    answers = distillation.answers(inputs)
    student = toy_model(0, DynSparseBertModel).eval()(**inputs, output_hidden_states=True)
    embeddings = [pool(each.last_hidden_state, inputs["attention_mask"], "mean") for each in (student, answers)]
    loss = distillation.loss(inputs, student, answers)
    assert float(loss) == pytest.approx(float(embedding_loss(*embeddings).mean()), rel=1e-6)
    assert float(distillation.loss(inputs, answers, answers)) == pytest.approx(0.0, abs=1e-6)
    ((weight, loss),) = distillation.on_top(inputs, answers, answers)
    assert (weight, float(loss)) == (1.0, 0.0)
    with pytest.raises(ValueError, match="must have one width. Got 32 and 64"):
        SentenceDistillation(teacher).check_student(toy_model(0, DynSparseBertModel, hidden_size=64))


@pytest.mark.parametrize(
    ("settings", "pooling"),
    [
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False, "include_prompt": True}, "mean"),
        ({"pooling_mode": "max"}, "max"),
        ({"pooling_mode_lasttoken": True}, "pooling_mode_lasttoken"),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": True}, "must pool in one way. Got mean, max"),
    ],
)
def test_how_a_checkpoint_pools(tmp_path, settings, pooling):
    assert sentence_files(str(tmp_path)) is None
    write_sentence_files(tmp_path, None, pooling="cls", width=32, max_seq_length=8)
    assert find_pooling(sentence_files(str(tmp_path))) == "cls"
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(settings))
    if "must" in pooling:
        with pytest.raises(ValueError, match=pooling):
            find_pooling(tmp_path)
    else:
        assert find_pooling(tmp_path) == pooling


@pytest.mark.parametrize(
    "modules", ["{}", "no JSON", '[{"type": "sentence_transformers.models.CLIPModel", "path": ""}]']
)
def test_what_is_no_sentence_encoder(tmp_path, modules):
    (tmp_path / "modules.json").write_text(modules)
    with pytest.raises(ValueError, match="must be a list of modules|must begin with a Transformer and a Pooling"):
        find_pooling(tmp_path)
