"""What of a folder goes to the Hub, and whether it may."""

import os
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path

from transformers import PreTrainedModel

from .._transformers import CONFIG_NAME, TRAINER_STATE_NAME
from ..checkpoints.loading import load_model
from ..checkpoints.remote_code import AUTO_MAP, add_code
from ..checkpoints.saved_run import CHECKSUM_FILE, STAGING_FOLDER, STATE_FILES
from ..compress.int8.quantizer import int8_modules
from ..files import read_object
from ..models import DynSparseBertConfig
from ..nn.linear import sparse_layers
from ..reports.facts import PAGE_FILE
from ..topology.frames import HISTORY_FOLDER
from .allowed import check_file, check_regular


LAST_CHECKPOINT = "last-checkpoint"  # the folder of `hub_strategy="checkpoint"`; the name is transformers'
PENDING = "pending-upload-of-"
# What a resumed run reads beside the model: pickles, as PyTorch writes them. They are pushed with a checkpoint only.
TRAINING_STATE = (*STATE_FILES, CHECKSUM_FILE)
# Names that belong to a run, not to its model. The arguments are a pickle too, and nothing reads them.
_LEFT_OUT = (
    *(name for name in TRAINING_STATE if name != TRAINER_STATE_NAME),  # its history is what a card tells
    *("training_args.bin", "checkpoint-*", LAST_CHECKPOINT, STAGING_FOLDER, f"{PENDING}*", "[._]*"),
    *("runs", HISTORY_FOLDER, PAGE_FILE),  # event files, a frame for every topology update, and what shows them
)

Files = Mapping[str, Path | bytes]


def model_files(folder: Path, with_code: bool = False) -> dict[str, Path | bytes]:
    """
    What of `folder` belongs into a repository, by path: all but hidden files and what a training run left.

    Args:
        with_code (`bool`): with the modelling code; always if config.json names code that is not there.

    Raises:
        ValueError: if a file among it may not be pushed.
    """
    files: dict[str, Path | bytes] = {}
    for file in _walk(folder):
        check_file(file, folder.resolve(), _is_left_out)
        files[file.relative_to(folder).as_posix()] = file
    if with_code or (_names_code(folder) and "modeling_dynsparse_bert.py" not in files):
        files |= add_code(folder)
    return files


def checkpoint_files(checkpoint: Path, subfolder: str) -> dict[str, Path | bytes]:
    """
    The model of a checkpoint and, in `subfolder`, all that a resumed run reads.

    Raises:
        ValueError: if a file among it may not be pushed.
    """
    model = model_files(checkpoint)
    state = {
        file.name: file
        for file in sorted(checkpoint.iterdir())
        if any(fnmatchcase(file.name, pattern) for pattern in TRAINING_STATE)
    }
    for file in state.values():
        check_regular(file, checkpoint.resolve())
    return {**model, **{f"{subfolder}/{path}": file for path, file in {**model, **state}.items()}}


def check_model(folder: Path) -> PreTrainedModel:
    """
    The model in `folder`, loaded: that is how it is known to be whole, and sparse.

    Raises:
        ValueError: saying what is wrong.
    """
    if not (folder / CONFIG_NAME).is_file():
        raise ValueError(
            f"Only a folder that `save_pretrained` wrote can be pushed. Got {folder} without config.json."
        )
    try:
        model = load_model(folder, use_safetensors=True)
    except OSError as error:
        raise ValueError(
            f"A model to be pushed must consist of whole safetensors files. Got {folder}: {error}. Save it again."
        ) from error
    is_ours = isinstance(model.config, DynSparseBertConfig)
    if not (is_ours or sparse_layers(model) or int8_modules(model)):
        raise ValueError(
            f"Only a sparse model can be pushed. Got {folder}, a {type(model).__name__} without sparse layers. Use "
            "its own `push_to_hub`."
        )
    return model


def _walk(folder: Path) -> Iterator[Path]:
    """The files in `folder` and below, but for those left out. No link to a folder is followed."""
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if _is_left_out(entry.name):
            continue
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(Path(entry))
        else:
            yield Path(entry)


def _is_left_out(name: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in _LEFT_OUT)


def _names_code(folder: Path) -> bool:
    config = folder / CONFIG_NAME
    return config.exists() and read_object(config).get("auto_map") == AUTO_MAP
