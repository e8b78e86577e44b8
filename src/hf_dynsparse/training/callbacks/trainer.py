"""The callbacks that a `DynSparseTrainer` works with: one of each kind, in order, and connected with each other."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainerCallback

from ...nn.linear import trainable_layers
from ..arguments import DynSparseTrainingArguments
from ..ddp import rebuild_reducer_
from .distance_bias import DistanceBiasCallback
from .epoch import EpochCallback
from .kernels import KernelCallback
from .slimming import EarlyBirdCallback
from .throughput import Callback, ThroughputCallback, check_one_of_each, find_callback
from .topology import TopologyCallback


# Two of a kind would both act on the model, or be told apart by nobody.
ONE_OF_EACH: tuple[type[TrainerCallback], ...] = (TopologyCallback, EarlyBirdCallback, DistanceBiasCallback)
ONE_OF_EACH += (KernelCallback, ThroughputCallback, EpochCallback)

Given = Sequence[TrainerCallback | type[TrainerCallback]] | None


class CallbackTrainer(Trainer):
    """[`~transformers.Trainer`] that finds its own callbacks by what they do."""

    args: DynSparseTrainingArguments
    accelerator: Any

    @property
    def topology(self) -> TopologyCallback | None:
        """The callback that updates the topology."""
        return find_callback(self.callback_handler.callbacks, TopologyCallback)

    @property
    def early_bird(self) -> EarlyBirdCallback | None:
        """The callback that searches for a ticket."""
        return find_callback(self.callback_handler.callbacks, EarlyBirdCallback)

    @property
    def distance_bias(self) -> DistanceBiasCallback | None:
        """The callback that lets a distance bias fall."""
        return find_callback(self.callback_handler.callbacks, DistanceBiasCallback)

    @property
    def kernels(self) -> KernelCallback:
        """The callback that chooses the backends."""
        return self._needed(KernelCallback)

    @property
    def throughput(self) -> ThroughputCallback:
        """The callback that counts tokens and seconds."""
        return self._needed(ThroughputCallback)

    def _needed(self, kind: type[Callback]) -> Callback:
        callback = find_callback(self.callback_handler.callbacks, kind)
        if callback is None:
            raise ValueError(
                f"`DynSparseTrainer` works with its `{kind.__name__}`. Got none: it was removed. Leave it, or add one."
            )
        return callback

    def add_callback(self, callback: type[TrainerCallback] | TrainerCallback) -> None:
        """
        As in transformers.

        Raises:
            ValueError: for a second one of a kind that must be alone.
        """
        made = _made(callback, self.args)
        callbacks = [*self.callback_handler.callbacks, made]
        check_one_of_each(callbacks, ONE_OF_EACH)
        super().add_callback(made)
        self._connect(callbacks)

    def _with_own_callbacks(
        self, model: nn.Module, args: DynSparseTrainingArguments, callbacks: Given
    ) -> list[TrainerCallback]:
        """The callbacks that were given, and those that this trainer needs beside them."""
        given = [_made(callback, args) for callback in callbacks or ()]
        if args.distance_bias is not None and find_callback(given, DistanceBiasCallback) is None:
            given.append(DistanceBiasCallback(args.distance_bias))
        # Throughput last, so that the time of a topology update counts.
        for kind in (*([TopologyCallback] if trainable_layers(model) else []), KernelCallback, ThroughputCallback):
            if find_callback(given, kind) is None:
                given.append(_made(kind, args))
        check_one_of_each(given, ONE_OF_EACH)
        self._connect(given)
        return given

    @contextmanager
    def _keeping_callbacks(self) -> Iterator[None]:
        """Callbacks that are made anew inside, from a checkpoint, take the places and connections of the first."""
        order = [type(callback) for callback in self.callback_handler.callbacks]
        yield
        # What one does for another goes by the order.
        self.callback_handler.callbacks.sort(key=lambda callback: order.index(type(callback)))
        self._connect(self.callback_handler.callbacks)

    def _connect(self, callbacks: Sequence[TrainerCallback]) -> None:
        topology = find_callback(callbacks, TopologyCallback)
        if topology is not None:
            topology.on_resize = self._after_resize

    def _after_resize(self) -> None:
        self.kernels.plan_again(self.accelerator.unwrap_model(self.model))
        if isinstance(self.model_wrapped, DistributedDataParallel):
            rebuild_reducer_(self.model_wrapped, self.accelerator.ddp_handler)


def _made(callback: TrainerCallback | type[TrainerCallback], args: DynSparseTrainingArguments) -> TrainerCallback:
    """A callback given as a class is made by the arguments of the run."""
    if not isinstance(callback, type):
        return callback
    if issubclass(callback, TopologyCallback):
        return callback(args.topology_settings(), group_lasso=args.group_lasso)
    if issubclass(callback, KernelCallback):
        return callback(args.kernel_tuning, args.dense_workspace, args.fused_passes)
    return callback()
