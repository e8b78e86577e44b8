"""A dense model pruned layer by layer, each by what it reads in the model as pruned so far."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from math import prod
from typing import Any, cast

import torch
from torch import nn
from tqdm.auto import tqdm

from .budget import Curve, error_curve, share_out
from .kept import KeptStatistics, writing_statistics
from .least_squares import objective_of
from .selection import prune_to
from .settings import Calibration, check_batches
from .stages import Batch, Passes
from .statistics import Statistics


Weights = Mapping[str, torch.Tensor]
Shapes = Mapping[str, tuple[int, int]]
Measured = Iterable[tuple[Statistics, list[str]]]  # what some layers read, and which


@torch.no_grad()
def prune_by_calibration_(
    model: nn.Module, weights: Weights, nnzb: Mapping[str, int], block_shapes: Shapes, how: Calibration
) -> dict[str, int]:
    """
    Set all but some blocks of dense layers to zero, and fit what is left, and the biases, to the outputs of the dense
    model: least squares over positions, layer by layer, on the inputs that a layer gets from layers which are pruned
    already. The dense model and the pruned one run side by side, stage by stage: nothing is held but what passes from
    one stage to the next, and what the layers of one read.

    Args:
        model (`nn.Module`): changed in place; it is run in evaluation mode.
        weights (`Mapping[str, torch.Tensor]`): the layers by name, and views of their weights, of shape
            `(out_features, in_features)`.
        nnzb (`Mapping[str, int]`): how many blocks each is to keep.
        block_shapes (`Mapping[str, tuple[int, int]]`): `(rows, columns)` of a block of each.

    Returns:
        `dict[str, int]`: how many blocks each has kept.

    Raises:
        ValueError: for batches that are too few, or do not reach every layer, or statistics of another model; the
            model is then untouched.
    """
    if how.statistics is not None:
        measured = KeptStatistics(how.statistics, weights)
        kept = _shared_out(model, measured, weights, nnzb, block_shapes, how)
        with _bar(weights, "Pruning by kept statistics", how) as bar:
            for statistics, group in measured:
                _prune_group_(model, group, weights, statistics, kept, block_shapes, how)
                bar.update(len(group))
        return kept
    given = list(how.batches)
    check_batches(given, max(weight.shape[1] for weight in weights.values()))
    device = next(iter(weights.values())).device
    with _evaluating(model):
        passes = Passes(model, [_moved(batch, device) for batch in given], list(weights))
        groups = [group for stage in passes.stages for group in stage.groups]
        sequences = sum(len(next(filter(torch.is_tensor, batch.values()))) for batch in given)
        file: Any = how.save_statistics
        with nullcontext() if file is None else writing_statistics(file, groups, weights, sequences) as save:
            kept = _shared_out(model, _measured(passes, weights), weights, nnzb, block_shapes, how)
            _prune_(passes, weights, kept, block_shapes, how, save)
    return kept


def _prune_(
    passes: Passes,
    weights: Weights,
    nnzb: Mapping[str, int],
    block_shapes: Shapes,
    how: Calibration,
    save: Callable[[Statistics], None] | None,
) -> None:
    answers = dense_answers = passes.begin
    with _bar(weights, "Calibrated pruning", how) as bar:
        for number, stage in enumerate(passes.stages):
            dense: dict[str, list[torch.Tensor]] = {group[0]: [] for group in stage.groups}
            listeners = {name: partial(_store, rows) for name, rows in dense.items()}
            dense_answers = passes.run(number, dense_answers, listeners)  # before any layer of the stage is pruned
            for group in stage.groups:
                statistics, rows = _statistics(weights[group[0]]), dense.pop(group[0])
                if save is not None:
                    own = _statistics(weights[group[0]])
                    for index, inputs in enumerate(rows):
                        _measure(own, index, inputs)
                    save(own)
                passes.run(number, answers, {group[0]: partial(_compare, statistics, rows)}, until=group[0])
                _prune_group_(passes.model, group, weights, statistics, nnzb, block_shapes, how)
                bar.update(len(group))
            answers = passes.run(number, answers, {})


def _prune_group_(
    model: nn.Module,
    group: Iterable[str],
    weights: Weights,
    statistics: Statistics,
    nnzb: Mapping[str, int],
    block_shapes: Shapes,
    how: Calibration,
) -> None:
    """Prune layers that read the same."""
    for name in group:
        layer, weight = cast(Any, model.get_submodule(name)), weights[name]
        objective = objective_of(statistics, weight, layer.bias is not None, how.ridge, how.dense_share)
        fitted = prune_to(objective, weight, nnzb[name], block_shapes[name], how.selection, how.steps)
        if layer.bias is not None:
            moved = weight.double() @ statistics.dense_total - fitted @ statistics.total
            layer.bias.copy_(layer.bias + moved / statistics.count)
        weight.copy_(fitted)


def _measured(passes: Passes, weights: Weights) -> Measured:
    """Of the dense model."""
    answers = passes.begin
    for number, stage in enumerate(passes.stages):
        read = {group[0]: _statistics(weights[group[0]]) for group in stage.groups}
        answers = passes.run(number, answers, {name: partial(_measure, read[name]) for name in read})
        for group in stage.groups:
            yield read.pop(group[0]), group


def _shared_out(
    model: nn.Module,
    measured: Measured,
    weights: Weights,
    nnzb: Mapping[str, int],
    block_shapes: Shapes,
    how: Calibration,
) -> dict[str, int]:
    """How many blocks each layer is to keep: by its errors in the dense model, if it alone is pruned, or as given."""
    if how.budget != "error":
        return dict(nnzb)
    curves = dict[str, Curve]()
    with _bar(weights, "Sharing out the blocks", how) as bar:
        for statistics, group in measured:
            for name in group:
                has_bias = getattr(model.get_submodule(name), "bias", None) is not None
                objective = objective_of(statistics, weights[name], has_bias, how.ridge, how.dense_share)
                curves[name] = error_curve(objective, weights[name], nnzb[name], block_shapes[name], how.selection)
                bar.update()
    sizes = {name: prod(block_shapes[name]) for name in weights}
    return share_out(curves, sizes, sum(nnzb[name] * sizes[name] for name in weights))


def _statistics(weight: torch.Tensor) -> Statistics:
    return Statistics(weight.shape[1], weight.device)


def _store(rows: list[torch.Tensor], index: int, inputs: torch.Tensor) -> None:
    rows.append(inputs)


def _measure(statistics: Statistics, index: int, inputs: torch.Tensor) -> None:
    statistics.add(inputs, inputs)


def _compare(statistics: Statistics, dense: list[torch.Tensor], index: int, inputs: torch.Tensor) -> None:
    statistics.add(inputs, dense[index])


def _bar(weights: Weights, about: str, how: Calibration) -> Any:
    return tqdm(total=len(weights), desc=about, unit="layer", disable=None if how.progress else True)


def _moved(batch: Batch, device: torch.device) -> Batch:
    return {name: value.to(device) if torch.is_tensor(value) else value for name, value in batch.items()}


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
