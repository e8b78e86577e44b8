"""Going on from a checkpoint: only from one that is whole, and only with the run and model that it holds."""

import logging
from typing import Any

from torch import nn
from transformers import PreTrainedModel, TrainerState

from .._transformers import TrainOutput, has_length
from ..checkpoints.saved_run import SavedRun, last_checkpoint
from ..compress.int8.qat import round_embeddings_
from .callbacks.distance_bias import check_resumed
from .callbacks.throughput import pass_and_step
from .callbacks.trainer import CallbackTrainer
from .saving import SavingTrainer, warn_of_later_checkpoints


logger = logging.getLogger(__name__)


class ResumingTrainer(CallbackTrainer, SavingTrainer):
    """[`~transformers.Trainer`] that checks a checkpoint before it goes on from it, and then repeats the first run."""

    state: Any

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """
        As in transformers; a run that has done all its `max_steps` already is loaded and not trained further.

        Raises:
            ValueError: if the checkpoint to go on from is damaged, naming the file.
            FloatingPointError: if a loss or gradient is not finite, before the optimiser sees it.
            OSError: if the output folder cannot be written to, or another run has it, or the last save of the run
                fails; saves before that may fail, and are made up for by the next.
        """
        try:
            with self._own_output_dir(trial):
                return self._train(resume_from_checkpoint, trial, ignore_keys_for_eval)
        finally:
            if self.topology is not None:
                self.topology.end(self.accelerator.unwrap_model(self.model))

    def _train(
        self, resume_from_checkpoint: str | bool | None, trial: Any, ignore_keys_for_eval: list[str] | None
    ) -> TrainOutput:
        if resume_from_checkpoint is True:  # and stays so if there is none, for transformers to say
            resume_from_checkpoint = last_checkpoint(str(self.args.output_dir)) or True
        state = TrainerState()
        if isinstance(resume_from_checkpoint, str):
            run = SavedRun(resume_from_checkpoint)
            run.check_training_state(self._needed_state)
            state = run.state
        if self.args.should_save:
            warn_of_later_checkpoints(self._get_output_dir(trial), state.global_step)
        if not isinstance(resume_from_checkpoint, str) or not 0 < self.args.max_steps <= state.global_step:
            if state.global_step:
                logger.info("going on from step %d, by %s", state.global_step, resume_from_checkpoint)
            return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)
        logger.info("%s holds all %d steps: nothing to train.", resume_from_checkpoint, state.global_step)
        self._load_from_checkpoint(resume_from_checkpoint)
        self.state = state
        self.throughput.restore(state)
        if self.distance_bias is not None:
            self.distance_bias.follow_(self.accelerator.unwrap_model(self.model), state)
        if self.topology is not None:
            self.topology.restore(state, self.args.max_steps)
            model = self.accelerator.unwrap_model(self.model)
            self.topology.on_train_end(self.args, state, self.control, model=model)
        return TrainOutput(state.global_step, float("nan"), {})

    def _init_training_state(
        self,
        max_steps: int,
        num_update_steps_per_epoch: int,
        num_train_epochs: int,
        resume_from_checkpoint: str | None,
        trial: Any,
    ) -> tuple[int, int]:
        with self._keeping_callbacks():
            where = super()._init_training_state(
                max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
            )
        if resume_from_checkpoint is None:
            return where
        check_resumed(
            self.distance_bias, self.accelerator.unwrap_model(self.model), resume_from_checkpoint, self.state
        )
        if has_length(self.train_dataset):
            return where
        # All steps would be looked for in the first pass, and not found if the run had made more than one.
        epoch, steps = pass_and_step(SavedRun(resume_from_checkpoint).state)
        return epoch, 0 if self.args.ignore_data_skip else steps * self.args.gradient_accumulation_steps

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        own, run = self.accelerator.unwrap_model(self.model), SavedRun(resume_from_checkpoint)
        run.check_weights()
        given = None
        if self.topology is not None:
            self.topology.track_(own)  # a second call of `train` finds a model whose recording ended with the first
            given = self.topology.given_sizes(own)
        run.check_model(own, given)
        if run.given_sizes is not None:
            run.resize_(own, self.optimizer)
        args: Any = self.args
        if getattr(args, "quantization_aware", False) and args.quantize_embeddings is None:
            own.config.quantize_embeddings = run.quantize_embeddings  # the default was another once
            round_embeddings_(own, run.quantize_embeddings)
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        own = self.accelerator.unwrap_model(self.model)
        tied = own.all_tied_weights_keys if isinstance(own, PreTrainedModel) else {}
        # Tied weights are saved once, so one of their names is always missing.
        missing = [name for name in load_result.missing_keys if name not in tied]
        super()._issue_warnings_after_load(load_result._replace(missing_keys=missing))

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        # A denser model on the way would win, or one with more of a bias, and is not what the run is to give.
        if self.topology is not None and not self.topology.has_final_density:
            return False
        if self.distance_bias is not None and not self.distance_bias.is_final(self.state):
            return False
        return super()._determine_best_metric(metrics, trial)

    def _load_best_model(self) -> None:
        best, own = SavedRun(str(self.state.best_model_checkpoint)), self.accelerator.unwrap_model(self.model)
        best.check_weights()
        if self.topology is not None and self.topology.resizes:
            best.resize_(own, self.optimizer)
            self.topology.note_sizes(own)
        super()._load_best_model()
