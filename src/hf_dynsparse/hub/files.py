"""What of a folder goes to the Hub, and whether it may."""

import json
import re
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from zipfile import ZipFile, is_zipfile

from transformers import PreTrainedModel
from transformers.trainer import TRAINER_STATE_NAME

from ..checkpoint import CHECKSUM_FILE, STAGING_FOLDER, STATE_FILES
from ..int8.quantizer import int8_modules
from ..models import DynSparseBertConfig
from ..nn import sparse_layers
from ..remote_code import AUTO_MAP, add_code
from ..saved_model import load_config, model_class
from ..topology_frames import HISTORY_FOLDER


LAST_CHECKPOINT = "last-checkpoint"  # the folder of `hub_strategy="checkpoint"`; the name is transformers'
PENDING = "pending-upload-of-"
# What a resumed run reads beside the model: pickles, as PyTorch writes them. They are pushed with a checkpoint only.
TRAINING_STATE = (*STATE_FILES, CHECKSUM_FILE)
# Names that belong to a run, not to its model. The arguments are a pickle too, and nothing reads them.
_LEFT_OUT = (
    *(name for name in TRAINING_STATE if name != TRAINER_STATE_NAME),  # its history is what a card tells
    *("training_args.bin", "checkpoint-*", LAST_CHECKPOINT, STAGING_FOLDER, f"{PENDING}*", "[._]*"),
    *("runs", HISTORY_FOLDER),  # event files, and a frame for every topology update
)
_PICKLE_SUFFIXES = (".bin", ".ckpt", ".joblib", ".pickle", ".pkl", ".pt", ".pth")

Files = Mapping[str, Path | bytes]


def model_files(folder: Path, with_code: bool = False) -> dict[str, Path | bytes]:
    """
    What of `folder` belongs into a repository, by path: all but hidden files and what a training run left.

    Args:
        with_code (`bool`): with the modelling code; always if config.json names code that is not there.

    Raises:
        ValueError: if a pickle is among it.
    """
    files: dict[str, Path | bytes] = {}
    for file in sorted(folder.rglob("*")):
        path = file.relative_to(folder)
        if file.is_dir() or any(fnmatchcase(part, pattern) for part in path.parts for pattern in _LEFT_OUT):
            continue
        if _is_pickle(file):
            raise ValueError(
                f"Only what is safe to load may be pushed: safetensors, no pickles. Got {file}. Save it as "
                "safetensors, or remove it."
            )
        files[path.as_posix()] = file
    if with_code or (_names_code(folder) and "modeling_dynsparse_bert.py" not in files):
        files |= add_code(folder)
    return files


def checkpoint_files(checkpoint: Path, subfolder: str) -> dict[str, Path | bytes]:
    """The model of a checkpoint and, in `subfolder`, all that a resumed run reads."""
    model = model_files(checkpoint)
    state = {file.name: file for pattern in TRAINING_STATE for file in checkpoint.glob(pattern)}
    return {**model, **{f"{subfolder}/{path}": file for path, file in {**model, **state}.items()}}


def check_model(folder: Path) -> PreTrainedModel:
    """
    The model in `folder`, loaded: that is how it is known to be whole, and sparse.

    Raises:
        ValueError: saying what is wrong.
    """
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"Only a folder that `save_pretrained` wrote can be pushed. Got {folder} without config.json."
        )
    config = load_config(folder)
    architecture = model_class(config)
    try:
        model: PreTrainedModel = architecture.from_pretrained(folder, use_safetensors=True)
    except OSError as error:
        raise ValueError(
            f"A model to be pushed must consist of whole safetensors files. Got {folder}: {error}. Save it again."
        ) from error
    if config.model_type != DynSparseBertConfig.model_type and not (sparse_layers(model) or int8_modules(model)):
        raise ValueError(
            f"Only a sparse model can be pushed. Got {folder}, a {architecture.__name__} without sparse layers. Use "
            "its own `push_to_hub`."
        )
    return model


def _names_code(folder: Path) -> bool:
    config = folder / "config.json"
    return config.exists() and json.loads(config.read_text(encoding="utf-8")).get("auto_map") == AUTO_MAP


def _is_pickle(file: Path) -> bool:
    """By its name, or by what `torch.save` and `pickle` write first."""
    if file.suffix in _PICKLE_SUFFIXES:
        return True
    if is_zipfile(file):
        with ZipFile(file) as archive:
            return any(name.endswith(".pkl") for name in archive.namelist())
    with file.open("rb") as content:
        return file.suffix != ".safetensors" and re.match(rb"\x80[\x02-\x05]", content.read(2)) is not None
