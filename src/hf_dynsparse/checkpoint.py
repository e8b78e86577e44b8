"""Checkpoints that exist whole or not at all: written aside, then renamed."""

import logging
import os
import shutil
from pathlib import Path

from safetensors import safe_open
from transformers import PreTrainedModel
from transformers.trainer_utils import get_last_checkpoint


logger = logging.getLogger(__name__)

# Not named checkpoint-*: nothing that looks for the last checkpoint may find a half-written one.
STAGING_FOLDER = "incomplete-save"


def remove_interrupted_save(run_dir: str | Path) -> None:
    """Remove what a killed process had begun to save in `run_dir`; the last complete checkpoint is untouched."""
    staging = Path(run_dir) / STAGING_FOLDER
    if staging.exists():
        logger.warning(
            "%s holds a save that was interrupted; it is removed. Complete checkpoints are untouched.", staging
        )
        shutil.rmtree(staging)


def publish_checkpoint(run_dir: str | Path, name: str) -> None:
    """
    Give the checkpoint `name`, written whole in the staging folder, its place in `run_dir`, replacing an older one.
    """
    staging, final = Path(run_dir) / STAGING_FOLDER, Path(run_dir) / name
    if final.exists():
        os.replace(final, staging / f"{name}.replaced")
    os.replace(staging / name, final)
    shutil.rmtree(staging)


def find_run_to_resume(output_dir: str | Path, resume_from_checkpoint: str | None) -> str | None:
    """
    The checkpoint folder that a script must go on from, `None` for a new run.

    Args:
        output_dir (`str` or `Path`): where the run is written.
        resume_from_checkpoint (`str`, *optional*): a checkpoint folder, or `"last"`: the newest in `output_dir`.

    Raises:
        FileNotFoundError: if the checkpoint is none.
        ValueError: if a new run would be written over another.
    """
    last = get_last_checkpoint(str(output_dir)) if Path(output_dir).is_dir() else None
    if resume_from_checkpoint == "last":
        return last
    if resume_from_checkpoint is not None:
        if not (Path(resume_from_checkpoint) / "trainer_state.json").is_file():
            raise FileNotFoundError(
                f"`--resume_from_checkpoint` must name a checkpoint folder or `last`. Got {resume_from_checkpoint}."
            )
        return resume_from_checkpoint
    if last is not None or (Path(output_dir) / "summary.json").exists():
        raise ValueError(
            f"`--output_dir` must not hold another run. Got {output_dir}, which does. Give a new folder, or "
            "--resume_from_checkpoint last to go on with that run."
        )
    return None


def check_same_model(model: PreTrainedModel, checkpoint: str | Path) -> None:
    """
    Refuse to go on with another model than that of `checkpoint`: the Trainer would take the weights whose names agree,
    and leave the others as they are.

    Raises:
        ValueError: naming the first tensor that the checkpoint lacks, or has in another shape.
    """
    saved: dict[str, list[int]] = {}
    for file in Path(checkpoint).glob("model*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            saved |= {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118
    tied = {*model.all_tied_weights_keys, *model.all_tied_weights_keys.values()}
    exploration = (".ever_active", ".active_since")  # a run without it may be followed by one with
    for name, tensor in model.state_dict().items():
        if saved and name not in tied and not name.endswith(exploration) and saved.get(name) != list(tensor.shape):
            theirs = tuple(saved[name]) if name in saved else "none"
            raise ValueError(
                f"A resumed run must have the model of its checkpoint. Got `{name}` of shape {tuple(tensor.shape)}, "
                f"but {checkpoint} has {theirs}. Start from the same model, with the same sparsity, block size and "
                "fine-tuning mode, or write to a new folder."
            )
