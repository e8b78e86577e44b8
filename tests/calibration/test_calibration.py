"""Calibrated pruning: least squares, which blocks stay, stages of models, and what is refused."""

import copy
from functools import partial
from itertools import combinations
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from toy import toy_batch, toy_config
from transformers import (
    AlbertConfig,
    AutoModel,
    BertConfig,
    DistilBertConfig,
    FunnelConfig,
    FunnelModel,
    GPT2Config,
    LlamaConfig,
    ModernBertConfig,
    RobertaConfig,
    T5Config,
)

from hf_dynsparse import Calibration, DynSparseBertForMaskedLM, DynSparseBertModel, sparse_layers, sparsify_
from hf_dynsparse.calibration.budget import share_out
from hf_dynsparse.calibration.least_squares import Objective, objective_of, solve, solve_with_costs
from hf_dynsparse.calibration.selection import SELECTIONS, prune_path
from hf_dynsparse.calibration.stages import Passes
from hf_dynsparse.calibration.statistics import Statistics


SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 40,
    "pad_token_id": 0,
}
CONFIGS: dict[str, Any] = {
    "bert": BertConfig(**SIZES),
    "roberta": RobertaConfig(**SIZES),
    "distilbert": DistilBertConfig(vocab_size=64, dim=32, hidden_dim=64, n_layers=2, n_heads=2),
    "modernbert": ModernBertConfig(**SIZES, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2),
    "gpt2": GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=40, bos_token_id=1, eos_token_id=2),
    "llama": LlamaConfig(**SIZES, num_key_value_heads=1, bos_token_id=1, eos_token_id=2),
    # Lists of lists, and hidden states that skip stages: no chain.
    "funnel": FunnelConfig(vocab_size=64, block_sizes=[1, 1], d_model=32, n_head=2, d_head=16, d_inner=64),
}


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def build(name: str) -> Any:
    """A dense toy model whose layers do more than those of a fresh one."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = copy.deepcopy(CONFIGS[name])
        model = (FunnelModel(config) if name == "funnel" else AutoModel.from_config(config)).eval()
        for parameter in model.parameters():
            parameter.data.add_(torch.randn_like(parameter) * (0.15 if parameter.dim() > 1 else 0.05))
    return model


def tokens(rows: int = 24, seed: int = 0) -> dict[str, torch.Tensor]:
    """A batch with padding."""
    batch = toy_batch(rows, seed=seed)
    batch["attention_mask"][rows // 2 :, 8:] = 0
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


@torch.no_grad()
def hidden(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """What the model returns at positions without padding."""
    return model.eval()(**batch)[0][batch["attention_mask"].bool()]


def measured(inputs: torch.Tensor, dense: torch.Tensor) -> Statistics:
    statistics = Statistics(inputs.shape[1], inputs.device)
    for some, others in zip(inputs.split(70), dense.split(70), strict=True):
        statistics.add(some, others)
    return statistics


def entries(active: torch.Tensor, block_shape: tuple[int, int]) -> torch.Tensor:
    return active.repeat_interleave(block_shape[0], 0).repeat_interleave(block_shape[1], 1)


def loss(objective: Objective, weight: torch.Tensor) -> torch.Tensor:
    return ((weight @ objective.hessian - 2 * objective.target) * weight).sum()


@pytest.mark.parametrize(
    ("block_shape", "has_bias", "share"), [((1, 1), True, 1.0), ((4, 4), False, 0.25), ((2, 8), True, 0.0)]
)
def test_the_fit_is_plain_least_squares(block_shape, has_bias, share):
    dense, weight, bias = draw(200, 16) + 1, draw(8, 16, seed=1), draw(8, seed=2)
    inputs = dense + 0.3 * draw(200, 16, seed=3)
    active = draw(8 // block_shape[0], 16 // block_shape[1], seed=4) > 0
    active[0] = False
    found = solve(objective_of(measured(inputs, dense), weight, has_bias, 0.0, share), active, block_shape)
    outputs = (share * dense + (1 - share) * inputs) @ weight.T + (bias if has_bias else 0)
    for row, wanted, stays in zip(found, outputs.T, entries(active, block_shape), strict=True):
        features = torch.cat([inputs[:, stays], torch.ones(200, int(has_bias), dtype=torch.float64)], dim=1)
        expected = torch.linalg.lstsq(features, wanted[:, None]).solution[: stays.sum(), 0]
        torch.testing.assert_close(row[stays], expected, atol=1e-8, rtol=0)
        assert not row[~stays].any()


def test_inputs_that_never_vary_can_be_fitted():
    """As behind a layer without an active block in its values. Products in float32 leave rounding of a zero."""
    constant = torch.randn(16, generator=torch.Generator().manual_seed(0)).expand(500, 16)
    objective = objective_of(measured(constant, constant), torch.ones(4, 16), True, 0.01, 0.5)
    assert solve(objective, torch.ones(1, 4, dtype=torch.bool), (4, 4)).isfinite().all()


def test_the_cost_of_a_block_is_that_of_solving_without_it():
    objective = Objective(torch.cov(draw(40, 12).T) + torch.eye(12), draw(6, 12, seed=1))
    for block_shape in ((1, 1), (2, 3)):
        active = draw(6 // block_shape[0], 12 // block_shape[1], seed=2) > -0.7
        weight, costs = solve_with_costs(objective, active, block_shape)
        assert not costs[~active].any()
        for place in active.nonzero().tolist():
            without = active.clone()
            without[tuple(place)] = False
            grown = loss(objective, solve(objective, without, block_shape)) - loss(objective, weight)
            torch.testing.assert_close(costs[tuple(place)], grown, atol=1e-10, rtol=1e-8)


def test_the_surgeon_removes_what_an_exhaustive_search_does():
    """Where greedy choice is the best one: a single block; and with a step for each, one that is seldom beaten."""
    objective = Objective(torch.cov(draw(40, 12).T) + 0.1 * torch.eye(12), draw(4, 12, seed=1))
    dense = solve(objective, torch.ones(2, 4, dtype=torch.bool), (2, 3))
    (found,) = prune_path(objective, dense, [7], (2, 3), "surgeon")
    tries = [solve(objective, torch.arange(8).view(2, 4) != gone, (2, 3)) for gone in range(8)]
    torch.testing.assert_close(found, min(tries, key=partial(loss, objective)))
    *_, greedy = prune_path(objective, dense, range(7, 2, -1), (2, 3), "surgeon")
    (at_once,) = prune_path(objective, dense, [3], (2, 3), "magnitude")
    assert loss(objective, greedy) < loss(objective, at_once)


def test_blocks_chosen_together_are_near_the_best_of_all():
    """Of 70 ways to keep four of eight blocks; removed one by one they are 1.6 % off in the mean of these layers."""
    losses: dict[str, list[float]] = {"admm": [], "surgeon": [], "best": []}
    for seed in range(8):
        objective = Objective(torch.cov(draw(14, 12, seed=seed).T) + 0.1 * torch.eye(12), draw(4, 12, seed=seed + 9))
        dense = solve(objective, torch.ones(2, 4, dtype=torch.bool), (2, 3))
        rest = float(loss(objective, dense))
        for selection in ("admm", "surgeon"):
            *_, found = prune_path(objective, dense, [6, 5, 4], (2, 3), selection)
            losses[selection].append(float(loss(objective, found)) - rest)
        subsets = torch.tensor([[place in kept for place in range(8)] for kept in combinations(range(8), 4)])
        tries = [solve(objective, subset.view(2, 4), (2, 3)) for subset in subsets]
        losses["best"].append(min(float(loss(objective, weight)) for weight in tries) - rest)
    worse = {name: sum(some) / sum(losses["best"]) for name, some in losses.items()}
    assert 1.0 - 1e-9 <= worse["admm"] < 1.005 < worse["surgeon"], worse


def test_blocks_go_where_they_save_most():
    curves = {"steep": {1: 0.8, 2: 0.4, 4: 0.0}, "flat": {1: 0.3, 2: 0.2, 4: 0.1}, "wide": {2: 0.5, 4: 0.1}}
    sizes = {"steep": 4, "flat": 4, "wide": 8}
    assert share_out(curves, sizes, 24) == {"steep": 1, "flat": 1, "wide": 2}
    assert share_out(curves, sizes, 36) == {"steep": 4, "flat": 1, "wide": 2}
    assert share_out(curves, sizes, 52) == {"steep": 4, "flat": 1, "wide": 4}
    assert share_out(curves, sizes, 1000) == {"steep": 4, "flat": 4, "wide": 4}


@pytest.mark.parametrize("name", CONFIGS)
def test_every_architecture_keeps_more_than_its_largest_blocks_do(name):
    dense, batches, held_out = build(name), [tokens(), tokens(12, seed=1)], tokens(16, seed=2)
    inputs = [batch["input_ids"].clone() for batch in batches]
    wanted = hidden(dense, held_out)
    errors = {}
    for kind, how in {"norm": None, "calibrated": batches}.items():
        model = sparsify_(copy.deepcopy(dense), 8, 0.5, calibration=how)
        errors[kind] = float((hidden(model, held_out) - wanted).norm() / wanted.norm())
    assert errors["calibrated"] < 0.9 * errors["norm"], errors
    assert all(map(torch.equal, inputs, (batch["input_ids"] for batch in batches)))


@pytest.mark.parametrize(("name", "stages", "groups"), [("bert", 2, 4), ("gpt2", 2, 4), ("funnel", 1, 0)])
def test_stages_answer_as_the_model_does(name, stages, groups):
    model, batch = build(name), tokens()
    names = [name for name, module in model.named_modules() if type(module).__name__ in ("Linear", "Conv1D")]
    names = [name for name in names if "pooler" not in name]
    passes = Passes(model, [batch], names)
    assert len(passes.stages) == stages
    assert not groups or {len(stage.groups) for stage in passes.stages} == {groups}
    read: list[torch.Tensor] = []
    hook = model.get_submodule(names[-1]).register_forward_pre_hook(lambda _, args: read.append(args[0]))
    with torch.no_grad():
        model(**batch)
        hook.remove()
        answers = passes.begin
        for number in range(stages):
            told: list[torch.Tensor] = []
            last = number == stages - 1
            listeners = {names[-1]: lambda _, rows, told=told: told.append(rows)} if last else {}
            answers = passes.run(number, answers, listeners)
    kept = batch["attention_mask"].bool()
    torch.testing.assert_close(told[-1], read[0][kept], rtol=0, atol=0)


def test_nothing_depends_on_padding_or_chance():
    batch, model = tokens(), build("bert")
    other = {name: tensor.clone() for name, tensor in batch.items()}
    other["input_ids"][other["attention_mask"] == 0] = 7
    first, second, third = (
        sparsify_(copy.deepcopy(model), 8, 0.5, calibration=[inputs]).state_dict() for inputs in (batch, batch, other)
    )
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
        torch.testing.assert_close(tensor, third[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("selection", SELECTIONS)
def test_a_dense_bert_is_pruned_on_its_way_in(selection, tmp_path):
    DynSparseBertForMaskedLM(toy_config(sparsity=0.0)).to_dense().save_pretrained(tmp_path)
    sizes, how = {"*attention*": 4, "*": 8}, Calibration([tokens()], selection, budget="error")
    model = DynSparseBertForMaskedLM.from_pretrained(tmp_path, sparsity=0.75, block_size=sizes, calibration=how)
    model.save_pretrained(tmp_path / "sparse")
    assert model.config.sparsity == pytest.approx(0.75, abs=0.01)
    assert {layer.block_shape for layer in sparse_layers(model).values()} == {(4, 4), (8, 8)}
    again = DynSparseBertModel.from_pretrained(tmp_path / "sparse")
    assert torch.equal(hidden(again, tokens()), hidden(model.bert, tokens()))


def test_a_module_without_a_list_and_without_a_bias():
    model = nn.Sequential(nn.Linear(16, 16, bias=False), nn.GELU(), nn.Linear(16, 8)).train()

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = model

        def forward(self, values: torch.Tensor) -> torch.Tensor:
            return self.body(values)

    wrapped, batch = Wrapped(), {"values": draw(50, 16).float()}
    wanted = wrapped(**batch)
    errors = [
        (sparsify_(copy.deepcopy(wrapped), 2, 0.5, calibration=how)(**batch) - wanted).norm()
        for how in (None, [batch])
    ]
    assert errors[1] < errors[0]
    assert model.training


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        ([], "at least 64 tokens without padding.* Got 0 in 0 batches"),
        ([tokens(2)], "Got 20 in 1 batches"),
        ([tokens() | {"attention_mask": torch.zeros(24, 12, dtype=torch.int64)}], "Got 0 in 1 batches"),
        ([torch.ones(30, 12)], "must be a dictionary of tensors.* Got Tensor as batch 0"),
        ([tokens(), {"text": "a sentence"}], "Got dict as batch 1"),
        (
            [tokens() | {"attention_mask": torch.ones(24, 11, dtype=torch.int64)}],
            r"\(24, 11\) for \(24, 12\) in batch 0",
        ),
        ([tokens() | {"attention_mask": torch.ones(24, 12)}], "Got torch.float32"),
    ],
)
def test_what_cannot_calibrate_leaves_the_model_alone(calibration, message):
    model = build("bert")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        sparsify_(model, 4, 0.5, calibration=calibration)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_statistics_are_kept_and_used_again(tmp_path):
    dense, file = build("bert"), tmp_path / "statistics.safetensors"
    batches, score = [tokens(), tokens(seed=1)], {"selection": "activation"}

    def pruned(sparsity: float = 0.5, **how: Any) -> Any:
        calibration = Calibration(**score, **how) if how else None
        return sparsify_(copy.deepcopy(dense), 4, sparsity, calibration=calibration)

    saved, plain = pruned(batches=batches, save_statistics=file), pruned(batches=batches)
    assert all(map(torch.equal, saved.state_dict().values(), plain.state_dict().values()))
    # Layers that read the same stand together.
    with safe_open(file, "pt") as kept:
        assert {name.split(".", 3)[3] for name in kept.keys() if ".0." in name} == {  # noqa: SIM118
            f"{layer}.{part}"
            for layer in ("attention.self.query", "attention.output.dense", "intermediate.dense", "output.dense")
            for part in ("count", "gram", "total")
        }
        count = kept.get_tensor("encoder.layer.0.output.dense.count")
        assert count == sum(batch["attention_mask"].sum() for batch in batches)
        assert kept.metadata()["sequences"] == "48"
    # Nothing before the first layer has been pruned; blocks are shared out by the dense model in both ways.
    first = "encoder.layer.0.attention.self.query.values"
    assert torch.equal(pruned(statistics=file).state_dict()[first], saved.state_dict()[first])
    sizes = [
        {name: layer.nnzb for name, layer in sparse_layers(pruned(budget="error", **given)).items()}
        for given in ({"batches": batches}, {"statistics": file})
    ]
    assert sizes[0] == sizes[1]
    assert len(set(sizes[0].values())) == 3
    # To another sparsity: not as good as with text, but better than the largest blocks.
    batch = tokens(seed=2)
    errors = [
        float((hidden(pruned(0.6, **given), batch) - hidden(dense, batch)).square().mean())
        for given in ({"batches": batches}, {"statistics": file}, {})
    ]
    assert max(errors[:2]) < errors[2]


def test_statistics_of_something_else_are_refused(tmp_path):
    file, other = tmp_path / "statistics.safetensors", tmp_path / "other.safetensors"
    sparsify_(build("bert"), 4, 0.5, calibration=Calibration([tokens()], save_statistics=file))
    save_file({"weight": torch.zeros(2)}, other)
    trained = build("bert")
    trained.encoder.layer[1].output.dense.weight.data[3, 5] += 1e-3
    for model, given, message in (
        (trained, file, "which has others of `encoder.layer.1.output.dense`"),
        (build("llama"), file, "which has none of `layers.0.self_attn.q_proj`"),
        (build("bert"), other, "must be a file that `save_statistics` has written"),
    ):
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(ValueError, match=message):
            sparsify_(model, 4, 0.5, calibration=Calibration(statistics=given))
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    other.write_bytes(b"no header")
    with pytest.raises(ValueError, match="must be a safetensors file"):
        sparsify_(build("bert"), 4, 0.5, calibration=Calibration(statistics=other))
    with pytest.raises(FileExistsError, match="must name a new file"):
        Calibration([tokens()], save_statistics=file)
    with pytest.raises(FileNotFoundError, match="must be a file"):
        Calibration(statistics=tmp_path / "none")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"statistics": "a.safetensors"}, "take the place of batches to calibrate by. Got both"),
        ({"selection": "surgery"}, "`selection` must be one of admm, magnitude, activation, surgeon. Got 'surgery'"),
        ({"budget": "mine"}, "`budget` must be one of distribution, error"),
        ({"steps": 0}, "`steps` must be at least 1. Got 0"),
        ({"dense_share": 2.0}, r"`dense_share` must lie in \[0, 1\]. Got 2.0"),
        ({"ridge": -1.0}, "`ridge` must be a number from 0 on. Got -1.0"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        Calibration([tokens()], **settings)


def test_what_the_first_batch_does_not_reach():
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, values: torch.Tensor) -> torch.Tensor:
            return self.used(values)

    with pytest.raises(ValueError, match="must pass once through every layer that is pruned. Got 0 calls of `idle`"):
        sparsify_(Idle(), 2, 0.5, calibration=[{"values": torch.ones(20, 8)}])
    albert = AlbertConfig(**SIZES, embedding_size=16)
    with pytest.raises(ValueError, match="Got 2 calls of `encoder.albert_layer_groups.0.albert_layers.0.ffn`"):
        sparsify_(AutoModel.from_config(albert), 4, 0.5, targets=["*.ffn"], calibration=[tokens()])
    sizes = {"vocab_size": 64, "d_model": 32, "d_ff": 64, "d_kv": 16, "num_layers": 1, "num_heads": 2}
    with pytest.raises(ValueError, match="is for models of one stack. Got T5Model"):
        sparsify_(AutoModel.from_config(T5Config(**sizes)), 4, 0.5, calibration=[tokens()])
    with pytest.raises(ValueError, match="`calibration` prunes a dense checkpoint .* Got BertConfig"):
        DynSparseBertModel.from_pretrained("anywhere", config=BertConfig(), calibration=[tokens()])
