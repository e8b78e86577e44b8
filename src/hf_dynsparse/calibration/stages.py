"""A model taken apart by what it calls: its repeated parts in order, and the layers that read the same input."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, NamedTuple

import torch
from torch import nn

from .statistics import rows_of


Batch = Mapping[str, Any]  # arguments of the model, by name

# Told of the number of a batch, and of what a layer reads of it, as rows `(positions, in_features)`.
Listener = Callable[[int, torch.Tensor], None]


class Stage(NamedTuple):
    """
    A part of a model that runs in one go, such as one layer of an encoder.

    Attributes:
        module (`nn.Module`): that part.
        groups (`list[list[str]]`): the layers to be pruned in it by name, in order of call; those of a group read the
            same input.
    """

    module: nn.Module
    groups: list[list[str]]


class _Enough(Exception):
    """Ends a forward pass whose rest nobody needs."""


def find_stages(model: nn.Module, batch: Batch, names: Sequence[str]) -> list[Stage]:
    """
    The stages of `model` that hold the layers `names`, in order of call, as a pass of `batch` shows them: members of
    an `nn.ModuleList`, each called once and on what the one before it has returned. A model that is no such chain is
    one stage.

    Raises:
        ValueError: naming a layer that the batch does not reach, or reaches again and again.
    """
    layers, members = {model.get_submodule(name): name for name in names}, _members(model, names)
    calls: list[tuple[nn.Module, Any, Any]] = []  # module, input, output; kept, so that their identities are unique

    def record(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        calls.append((module, _first((*args, *kwargs.values())), _first(output) if module in members else None))

    with ExitStack() as hooks:
        for module in {**layers, **members}:
            hooks.enter_context(module.register_forward_hook(record, with_kwargs=True))
        model(**batch)
    times = Counter(layers[module] for module, _, _ in calls if module in layers)
    for name in names:
        if times[name] != 1:
            raise ValueError(
                f"`calibration` must pass once through every layer that is pruned. Got {times[name]} calls of "
                f"`{name}` for a batch. Leave the layer out by `ignore`, give batches that use it, or keep the "
                "blocks of largest norm (scripts: --calibration_samples 0)."
            )
    inputs = {layers[module]: id(input) for module, input, _ in calls if module in layers}
    chain = [call for call in calls if call[0] in members]
    linked = all(before[2] is after[1] for before, after in zip(chain, chain[1:], strict=False))
    held = [(module, [name for name in inputs if name in members[module]]) for module, _, _ in chain]
    if not linked or sorted(name for _, some in held for name in some) != sorted(names):
        return [Stage(model, _groups(inputs, inputs))]
    return [Stage(module, _groups(some, inputs)) for module, some in held]


def _members(model: nn.Module, names: Iterable[str]) -> dict[nn.Module, set[str]]:
    """The members of the outermost lists of modules that hold some of `names`, and which."""
    lists = [f"{name}." for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    members: dict[nn.Module, set[str]] = {}
    for name in names:
        prefix = next((prefix for prefix in lists if name.startswith(prefix)), None)
        if prefix is not None:
            member = model.get_submodule(prefix + name.removeprefix(prefix).split(".")[0])
            members.setdefault(member, set()).add(name)
    return members


def _groups(names: Iterable[str], inputs: Mapping[str, int]) -> list[list[str]]:
    groups: dict[int, list[str]] = {}
    for name in names:
        groups.setdefault(inputs[name], []).append(name)
    return list(groups.values())


def _first(values: Any) -> Any:
    """The first of some arguments, or of what a module returns."""
    return _first(values[0]) if isinstance(values, tuple | list) and values else values


def _numel(batch: Batch) -> int:
    return max(value.numel() for value in batch.values() if torch.is_tensor(value))


class Passes:
    """
    Passes of the same batches through one stage of a model after the other. The model itself prepares what a stage
    needs, such as masks; the stages before it are not run, but answer at once with what they are known to return.

    Args:
        model (`nn.Module`): in evaluation mode.
        batches (`Sequence[Mapping[str, Any]]`): its arguments. Nobody is told of positions that an `attention_mask`
            leaves out.
        names (`Sequence[str]`): the layers to be pruned.

    Raises:
        ValueError: naming a layer that the smallest batch does not reach.
    """

    def __init__(self, model: nn.Module, batches: Sequence[Batch], names: Sequence[str]) -> None:
        self.model, self.batches = model, batches
        self.stages = find_stages(model, min(batches, key=_numel), names)
        self.begin: list[Any] = [None] * len(batches)  # in the place of answers for the first stage

    def run(
        self, number: int, answers: Sequence[Any], listeners: Mapping[str, Listener], *, until: str | None = None
    ) -> list[Any]:
        """
        Run one stage over all batches.

        Args:
            number (`int`): of the stage.
            answers (`Sequence`): what the stage before it has returned for each batch.
            listeners (`Mapping[str, Callable]`): told of what layers read, by their names.
            until (`str`, *optional*): the layer at which to end each pass.

        Returns:
            `list`: what the stage returns for each batch; empty if passes end early.
        """
        outputs: list[Any] = []

        def end(module: nn.Module, args: Any, output: Any) -> None:
            outputs.append(output)
            raise _Enough

        before = [stage.module for stage in self.stages[:number]]
        for index, batch in enumerate(self.batches):
            with ExitStack() as hooks, _answering(before, answers[index]), suppress(_Enough):
                hooks.enter_context(self.stages[number].module.register_forward_hook(end))
                for name, listener in listeners.items():
                    layer, hook = self.model.get_submodule(name), self._hook(index, listener, name == until)
                    hooks.enter_context(layer.register_forward_pre_hook(hook, with_kwargs=True))
                self.model(**batch)
        return outputs

    def _hook(self, index: int, listener: Listener, is_last: bool) -> Callable[..., None]:
        mask = self.batches[index].get("attention_mask")

        def tell(module: nn.Module, args: Any, kwargs: Any) -> None:
            listener(index, rows_of(_first((*args, *kwargs.values())), mask))
            if is_last:
                raise _Enough

        return tell


@contextmanager
def _answering(modules: Sequence[nn.Module], answer: Any) -> Iterator[None]:
    """Inside, calls of `modules` return `answer`, and nothing else happens in them."""
    before = [vars(module).get("forward") for module in modules]
    for module in modules:
        vars(module)["forward"] = lambda *args, **kwargs: answer
    try:
        yield
    finally:
        for module, forward in zip(modules, before, strict=True):
            del vars(module)["forward"]
            if forward is not None:
                vars(module)["forward"] = forward
