"""A distance bias in attention: its numbers, and that every implementation, architecture and checkpoint has it."""

import copy
import json
import math
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from toy import toy_batch, toy_config, toy_model
from transformers import (
    AttentionInterface,
    AutoModel,
    AutoModelForMaskedLM,
    BertConfig,
    DebertaConfig,
    DistilBertConfig,
    ElectraConfig,
    GPT2Config,
    ModernBertConfig,
    MPNetConfig,
    RobertaConfig,
)

from hf_dynsparse import DynSparseBertForMaskedLM, densify_, sparsify_
from hf_dynsparse.models.dropout import ATTENTION
from hf_dynsparse.models.position_bias import (
    SUFFIX,
    PositionBias,
    bucket_distances,
    bucket_of,
    set_position_bias_,
    strength_of,
)


# Weights large enough for attention to look somewhere.
SIZES: dict[str, Any] = {
    **{"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2},
    **{"num_attention_heads": 2, "max_position_embeddings": 40, "initializer_range": 0.5},
    **{"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
}
CONFIGS: dict[str, Any] = {
    "bert": BertConfig(**SIZES),
    "dynsparse_bert": toy_config(initializer_range=0.5),
    "roberta": RobertaConfig(**SIZES),
    "electra": ElectraConfig(**SIZES, embedding_size=16),
    "distilbert": DistilBertConfig(
        vocab_size=64, dim=32, hidden_dim=64, n_layers=2, n_heads=2, max_position_embeddings=40, initializer_range=0.5
    ),
}
BATCH = {name: toy_batch()[name] for name in ("input_ids", "attention_mask")}


def build(name: str) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForMaskedLM.from_config(copy.deepcopy(CONFIGS[name])).eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model.eval()(**BATCH).logits
    return found[BATCH["attention_mask"].bool()]  # [tokens, vocabulary]


def test_three_tokens_and_two_heads_by_hand() -> None:
    query = torch.zeros(1, 2, 3, 4)
    near = torch.tensor([[0.0, 1, 2], [1, 0, 1], [2, 1, 0]])
    expected = torch.stack([-0.5 * near, -0.5 / 64 * near])[None]
    assert torch.equal(PositionBias("alibi", 2, 0.5)(query, query), expected)
    assert torch.equal(PositionBias("alibi", 2, 0.5)(query[:, :, :1], query), expected[:, :, 2:])
    assert torch.equal(PositionBias("alibi", 1, 1.0)(query[:, :1], query), -near[None, None])
    assert PositionBias("alibi", 2, 8.0)(query, query)[0, :, 2, 0].tolist() == [-16.0, -0.25]
    assert PositionBias("alibi", 2, 32.0)(query, query)[0, :, 2, 0].tolist() == [-30.0, -1.0]  # and no more than that
    # Learned ones start as that where a bucket has one distance, and know before from after.
    learned = PositionBias("t5", 2, 0.5)
    assert torch.equal(learned(query, query), expected)
    with torch.no_grad():
        learned.table.copy_(torch.arange(64.0).view(32, 2))
    buckets = torch.tensor([[0.0, 17, 18], [1, 0, 17], [2, 1, 0]])
    assert torch.equal(learned(query, query), 0.5 * torch.stack([2 * buckets, 2 * buckets + 1])[None])


def test_buckets() -> None:
    offsets = torch.tensor([-1000, -128, -90, -9, -8, -7, -1, 0, 1, 7, 8, 128])
    assert bucket_of(offsets).tolist() == [15, 15, 14, 8, 8, 7, 1, 0, 17, 23, 24, 31]
    nearest = bucket_distances(torch.device("cpu"))
    assert bucket_of(-nearest[:16].long()).tolist() == list(range(16))
    assert (bucket_of(1 - nearest[1:16].long()) == torch.arange(15)).all()


@pytest.mark.parametrize("implementation", ["sdpa", "eager", ATTENTION])
@pytest.mark.parametrize("mask", ["none", "bool", "additive"])
def test_attention_by_hand(implementation: str, mask: str) -> None:
    attention = copy.deepcopy(toy_model().bert.encoder.layer[0].attention.self).eval()
    query, key, value = torch.randn(3, 2, 2, 5, 16, generator=torch.Generator().manual_seed(0))
    seen = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]).bool()[:, None, None].expand(2, 1, 5, 5)
    given = {"none": None, "bool": seen, "additive": torch.where(seen, 0.0, -math.inf)}[mask]
    vars(attention)["position_bias"] = PositionBias("alibi", 2, 0.7)
    forward = AttentionInterface()[implementation + SUFFIX]
    found, _ = forward(attention, query, key, value, given, scaling=0.3, dropout=0.0)
    for row in range(2):
        for head in range(2):
            for i in range(5):
                keys = [j for j in range(5) if mask == "none" or seen[row, 0, i, j]]
                scores = [
                    0.3 * float(query[row, head, i] @ key[row, head, j]) - 0.7 * (1, 1 / 64)[head] * abs(i - j)
                    for j in keys
                ]
                weights = torch.tensor(scores).softmax(0)
                torch.testing.assert_close(found[row, i, head], weights @ value[row, head, keys])


@pytest.mark.parametrize("name", CONFIGS)
def test_every_architecture(name: str, tmp_path: Any) -> None:
    model = build(name)
    without = logits(model)
    set_position_bias_(model, 1.0)
    biased = logits(model)
    assert (biased - without).abs().max() > 0.01
    assert not [key for key in model.state_dict() if "position_bias" in key]
    assert torch.equal(logits(copy.deepcopy(model)), biased)
    # The implementation can be changed at any time.
    model.set_attn_implementation("eager")
    torch.testing.assert_close(logits(model), biased, rtol=1e-4, atol=1e-4)
    model.set_attn_implementation("sdpa")
    assert torch.equal(logits(model), biased)
    # A checkpoint of a sparse model has it.
    sparse = sparsify_(build(name), block_size=8, sparsity=0.5) if name != "dynsparse_bert" else model
    set_position_bias_(sparse, 0.3)
    expected = logits(sparse)
    sparse.save_pretrained(tmp_path)
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), expected)
    assert strength_of(loaded.config) == 0.3
    if name != "dynsparse_bert":
        with pytest.raises(ValueError, match="must have no distance bias.*strength 0.3. Train on with --distance_b"):
            densify_(loaded)
    set_position_bias_(model, 0.0)
    assert torch.equal(logits(model), without)
    assert model.config._attn_implementation == "sdpa"
    assert not {"position_bias", "position_bias_strength"} & model.config.to_dict().keys()


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (ModernBertConfig(**{k: SIZES[k] for k in list(SIZES)[:6]}, pad_token_id=0, eos_token_id=2), "has none"),
        (GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2, eos_token_id=2, bos_token_id=1), "has none"),
        (DebertaConfig(**SIZES), "attention of its own"),
        (MPNetConfig(**SIZES), "attention of its own"),
        (BertConfig(**SIZES, is_decoder=True), "is a decoder"),
    ],
    ids=lambda value: getattr(value, "model_type", None),
)
def test_what_needs_none_is_refused(config: Any, why: str) -> None:
    with pytest.raises(ValueError, match=f"encoders with absolute positions.*{why}.*Leave `distance_bias`"):
        set_position_bias_(AutoModel.from_config(config), 1.0)


def test_an_implementation_without_masks_is_refused() -> None:
    model = build("bert")
    set_position_bias_(model, 1.0)
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match="by `sdpa` or `eager`. Got BertModel with 'flex_attention'. Load it with"):
        logits(model)


@pytest.mark.parametrize("kind", ["alibi", "t5"])
def test_as_configuration(kind: str, tmp_path: Any) -> None:
    model = toy_model(initializer_range=0.5, position_bias=kind, position_bias_strength=0.5)
    if kind == "t5":
        torch.nn.init.normal_(model.bert.position_bias.table)
        model.train()(**toy_batch()).loss.backward()
        assert model.bert.position_bias.table.grad.abs().sum(1)[0] > 0
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert (saved["position_bias"], saved["position_bias_strength"]) == (kind, 0.5)
    assert torch.equal(logits(AutoModelForMaskedLM.from_pretrained(tmp_path)), logits(model))
    with pytest.raises(ValueError, match=f"must have no distance bias.*Got position_bias='{kind}' of strength 0.5"):
        model.to_dense()
    silent = DynSparseBertForMaskedLM.from_pretrained(tmp_path, position_bias_strength=0.0)
    torch.testing.assert_close(logits(silent.to_dense()), logits(silent))
    assert not {key for key in toy_config().to_dict() if "position" in key} - {"max_position_embeddings"}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"position_bias": "rotary"}, "`position_bias` must be one of alibi, t5. Got 'rotary'"),
        ({"position_bias": "alibi", "position_bias_strength": -1}, "must be a number from 0 on. Got -1"),
        ({"position_bias": "alibi", "heads_per_layer": [1, 2]}, "as many heads in every layer"),
    ],
)
def test_wrong_configurations(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(StrictDataclassError, match=message):
        toy_config(**wrong)
