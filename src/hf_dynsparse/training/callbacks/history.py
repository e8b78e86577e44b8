"""A callback that keeps how the topology of one layer evolves, and shows it while the model trains."""

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..._transformers import TensorBoardCallback, TrackioCallback
from ...nn.linear import trainable_layers
from ...reports.pictures.blocks import paint_blocks
from ...topology import ever_active
from ...topology.frames import Frame, forget_frames, history_files, write_frame
from .throughput import find_callback
from .topology import TopologyCallback


logger = logging.getLogger(__name__)

# Positions of blocks in all layers together up to which all are kept; half a megabyte a frame before it is compressed.
ALL_LAYERS = 2**22


class TopologyHistory(TrainerCallback):
    """
    Keeps which blocks are active, at the start of a run and after every topology update, in `topology_history/` of its
    output folder: a bit a block, from which `hf-dynsparse animate` and `hf-dynsparse report` draw. Of a model with up
    to four million positions of blocks all layers are kept, of a larger one `layer` alone. Where the run reports to
    TensorBoard or trackio, `layer` goes there as a picture.

    The frames survive interruptions: a resumed run removes those of the steps that it repeats. A disk that is full
    costs frames, not the run.

        trainer.add_callback(TopologyHistory(trainer))

    Args:
        trainer (`Trainer`): one with a [`TopologyCallback`], such as a [`DynSparseTrainer`] of a sparse model.
        layer (`str`, *optional*): the layer of the pictures; by default the first into the feed-forward part, or
            the first.

    Raises:
        ValueError: if no topology is updated, or the model has no such layer.
    """

    def __init__(self, trainer: Trainer, layer: str | None = None) -> None:
        self.callbacks = trainer.callback_handler.callbacks
        topology = find_callback(self.callbacks, TopologyCallback)
        layers = list(trainable_layers(trainer.accelerator.unwrap_model(trainer.model)))
        if topology is None or not layers:
            raise ValueError(
                "`TopologyHistory` needs a trainer that updates a topology. Got one without a `TopologyCallback` or "
                "without sparse layers. Leave it out for a dense model."
            )
        if layer is not None and layer not in layers:
            raise ValueError(f"`layer` must be a sparse layer of the model. Got {layer!r}. Choose one of {layers}.")
        self.layer = layer or next((name for name in layers if name.endswith("intermediate.dense")), layers[0])
        self._updates = 0
        self._before = np.empty(0, dtype=bool)  # the block map before the update to come

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._updates = self._updates_done()
        if state.is_world_process_zero:
            forget_frames(str(args.output_dir), after=state.global_step or -1)
            self._before = self._block_map(kwargs["model"])
            if not history_files(str(args.output_dir)):
                self._record(args, state, kwargs["model"])

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._updates != self._updates_done():
            self._updates = self._updates_done()
            if state.is_world_process_zero:
                self._record(args, state, kwargs["model"])

    # A resumed trainer may have made the callback that updates anew, which then comes after this one.
    on_step_begin = on_step_end

    def _updates_done(self) -> int:
        topology = find_callback(self.callbacks, TopologyCallback)
        return 0 if topology is None else int(topology.metrics.get("topology_updates", 0))

    def _block_map(self, model: nn.Module) -> np.ndarray:
        return trainable_layers(model)[self.layer].layout.to_mask().cpu().numpy()

    def _other_maps(self, model: nn.Module) -> dict[str, np.ndarray]:
        layers = trainable_layers(model)
        if sum(layer.num_blocks for layer in layers.values()) > ALL_LAYERS:
            return {}
        return {name: layer.layout.to_mask().cpu().numpy() for name, layer in layers.items() if name != self.layer}

    def _record(self, args: TrainingArguments, state: TrainerState, model: nn.Module) -> None:
        active = self._block_map(model)
        newborn, self._before = active & ~self._before, active
        try:
            frame = Frame(self.layer, self._updates, state.global_step, active)
            write_frame(str(args.output_dir), frame, self._other_maps(model))
        except OSError as error:
            logger.warning("The topology after step %d is missing in the history: %s", state.global_step, error)
        senders = [(SENDERS[type(callback)], callback) for callback in self.callbacks if type(callback) in SENDERS]
        if senders:
            layer = trainable_layers(model)[self.layer]
            picture = paint_blocks(active, newborn, ever_active(layer).view(layer.grid).cpu().numpy())
            for send, callback in senders:
                send(callback, f"topology/{self.layer}", picture, state.global_step)


def _to_tensorboard(callback: Any, tag: str, picture: np.ndarray, step: int) -> None:
    callback.tb_writer.add_image(tag, picture, step, dataformats="HWC")


def _to_trackio(callback: Any, tag: str, picture: np.ndarray, step: int) -> None:
    trackio = callback._trackio  # the module; it counts calls, so the step is sent as transformers sends it
    trackio.log({tag: trackio.Image(picture, caption=f"step {step}"), "train/global_step": step})


# By transformers' callback, which is there if `report_to` names it.
SENDERS: dict[type[TrainerCallback], Callable[[Any, str, np.ndarray, int], None]] = {
    TensorBoardCallback: _to_tensorboard,
    TrackioCallback: _to_trackio,
}
