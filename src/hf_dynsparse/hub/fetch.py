"""From the Hub: runs that go on from there."""

import re
from pathlib import Path

from huggingface_hub import snapshot_download

from .._transformers import TRAINER_STATE_NAME, get_last_checkpoint
from ..checkpoints.loading import split_revision
from .errors import HubError, ask
from .files import LAST_CHECKPOINT


def fetch_checkpoint(checkpoint: str | None, token: str | None = None) -> str | None:
    """
    What a script was told to resume from, with a repository replaced by the folder in the cache that it was downloaded
    to: what `hub_strategy="checkpoint"` pushed, or the newest that `"all_checkpoints"` did.

    Such a folder holds pickles. The Trainer reads them with `weights_only=True`.

    Args:
        checkpoint (`str`, *optional*): `"user/name"` or `"user/name@revision"`, with a branch, tag or commit; anything
            else, an existing folder for one, is returned as it is.

    Raises:
        HubError: if there is no such repository, revision or checkpoint.

    Example:
        ```python
        >>> trainer.train(resume_from_checkpoint=fetch_checkpoint("me/dynsparse-bert-medium-s90-b16"))
        ```
    """
    if checkpoint is None or not re.fullmatch(r"[\w.-]+/[\w.-]+(@.+)?", checkpoint) or Path(checkpoint).exists():
        return checkpoint
    repo_id, revision = split_revision(checkpoint)
    wanted = [f"{LAST_CHECKPOINT}/*", "checkpoint-*/*"]
    snapshot = Path(
        ask(
            f"Resuming from {checkpoint}, which is no folder here,",
            lambda: snapshot_download(repo_id, revision=revision, token=token, allow_patterns=wanted),
        )
    )
    for folder in (snapshot / LAST_CHECKPOINT, get_last_checkpoint(snapshot)):
        if folder is not None and Path(folder, TRAINER_STATE_NAME).is_file():
            return str(folder)
    raise HubError(
        f"Resuming needs a repository that a run wrote with `--push_to_hub --hub_strategy checkpoint`. Got "
        f"{checkpoint} without a folder {LAST_CHECKPOINT}. Start from its model with `--model_name_or_path` instead."
    )
