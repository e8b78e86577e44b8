"""Checkpoints that exist whole or not at all: written aside, then renamed."""

import logging
import os
import shutil
from pathlib import Path


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
