"""Pushing while and after training: what `--push_to_hub` does, with every `--hub_strategy`."""

import logging
import shutil
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, run_as_future
from transformers import Trainer, TrainingArguments

from .._transformers import HubStrategy, PushInProgress
from .errors import HubError
from .files import LAST_CHECKPOINT, PENDING, model_files
from .push import commit_files, open_repository, push_checkpoint


logger = logging.getLogger(__name__)


def open_hub_repository(args: TrainingArguments, token: str | None = None, private: bool | None = None) -> str:
    """
    The full name of the repository that a run pushes to, made if it does not exist. For one process only. A script can
    call it first of all, to fail before the data are prepared.

    Raises:
        HubError: if it cannot be made, or the token may not write there.
    """
    return open_repository(
        args.hub_model_id or Path(str(args.output_dir)).absolute().name,
        private=args.hub_private_repo if private is None else private,
        revision=args.hub_revision,
        token=token or args.hub_token,
    )


class HubTrainer(Trainer):
    """
    [`~transformers.Trainer`] that pushes whole commits without the pickle of its arguments, never from files that
    change meanwhile, and says before training what would fail after it.
    """

    push_in_progress: Any = None
    _waiting: str | None = None  # the newest checkpoint, if an upload stood in its way

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """
        As in transformers: called before training if `args.push_to_hub`, else by the first push.

        Raises:
            HubError: see [`open_hub_repository`].
        """
        if self.is_world_process_zero():
            self.hub_model_id: Any = open_hub_repository(self.args, token, private)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in transformers. The push that belongs to it, if `args.push_to_hub`, may fail with a line in the log."""
        super().save_model(output_dir, _internal_call=True)
        if self.args.push_to_hub and not _internal_call:
            try:
                self.push_to_hub(commit_message="Model save")
            except HubError as error:
                logger.error("%s", error)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """
        As in transformers: saves the model and pushes `args.output_dir`, less what only the run needs.

        Raises:
            HubError: if that failed. The model is saved; the message says how to push it.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        name = self.args.hub_model_id or self._output_dir.absolute().name
        self.create_model_card(**{"model_name": name.split("/")[-1], **kwargs})
        self._finish_current_push()

        def push() -> CommitInfo:
            try:
                if self.hub_model_id is None:
                    self.init_hf_repo(token, private)
                return commit_files(
                    self.hub_model_id,
                    model_files(self._output_dir),
                    message=commit_message or "End of training",
                    revision=revision or self.args.hub_revision,
                    token=token or self.args.hub_token,
                )
            except (HubError, ValueError) as error:
                again = f"hf_dynsparse.hub.push_folder({str(self._output_dir)!r}, {self.hub_model_id or name!r})"
                raise HubError(f"{error} The model is saved: `{again}` pushes it too.") from error

        return push() if blocking else run_as_future(push)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        pending: list[Future[Any]] = [] if self.push_in_progress is None else self.push_in_progress.jobs
        pending = [job for job in pending if not job.done()]
        strategy = self.args.hub_strategy
        if not self.is_world_process_zero() or strategy == HubStrategy.END:
            return
        if pending and not self.args.hub_always_push:
            self._waiting = checkpoint_folder
            return
        self._waiting = None
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        subfolder = {
            HubStrategy.CHECKPOINT: LAST_CHECKPOINT,
            HubStrategy.ALL_CHECKPOINTS: Path(checkpoint_folder).name,
        }
        try:
            job = push_checkpoint(
                checkpoint_folder,
                self.hub_model_id,
                subfolder=subfolder.get(HubStrategy(strategy)),
                message=f"Training in progress, step {Path(checkpoint_folder).name.rpartition('-')[2]}",
                revision=self.args.hub_revision,
                token=self.args.hub_token,
            )
        except OSError as error:  # of the disk: nothing has been sent yet
            logger.error("%s is saved, but not pushed: %s. The next save pushes again.", checkpoint_folder, error)
            return
        jobs: Any = [*pending, job]
        self.push_in_progress = PushInProgress(jobs)

    def _remove_pending_pushes(self) -> None:
        """Those of a process that was killed. For a run that has its folder to itself."""
        for leftover in self._output_dir.glob(f"{PENDING}*"):
            shutil.rmtree(leftover, ignore_errors=True)

    def _finish_current_push(self) -> None:
        super()._finish_current_push()
        if self._waiting is not None and Path(self._waiting).exists():
            self._push_from_checkpoint(self._waiting)
            super()._finish_current_push()

    @property
    def _output_dir(self) -> Path:
        return Path(str(self.args.output_dir))
