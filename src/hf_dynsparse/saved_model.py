"""Models in folders and on the Hub: their class, the small files beside their weights, and writing whole or not."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.utils import CONFIG_NAME

from . import models
from .files import flush, flush_tree


# What travels with a model whatever becomes of its weights: tokenizer, generation settings, licence.
COMPANIONS = (
    *("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "*.model"),
    *("chat_template*", "generation_config.json", "LICENSE*", "NOTICE*"),
)


def split_revision(source: str | Path) -> tuple[str, str]:
    """
    `"user/name@revision"` to its parts; the revision is `"main"` if none is given. A path that exists has none.
    """
    name, _, revision = str(source).rpartition("@") if "@" in str(source) else (str(source), "", "")
    return (str(source), "main") if Path(source).exists() else (name, revision or "main")


def load_config(source: str | Path) -> PretrainedConfig:
    """
    The configuration of a saved model.

    Args:
        source (`str` or `Path`): a folder, or a repository of the Hub as `"user/name"` or `"user/name@revision"`.

    Raises:
        FileNotFoundError: if there is none.
    """
    name, revision = split_revision(source)
    try:
        if Path(name).is_dir() and not Path(name, CONFIG_NAME).is_file():
            raise FileNotFoundError(f"there is no {CONFIG_NAME} in it.")
        config: PretrainedConfig = AutoConfig.from_pretrained(name, revision=revision)
    except (OSError, HFValidationError) as error:
        raise FileNotFoundError(
            f"A model must be a folder with a {CONFIG_NAME} or a repository of the Hub. Got {source}: {error}"
        ) from error
    return config


def model_class(config: PretrainedConfig) -> Any:
    """
    The class that `config.architectures` names: one of ours or of transformers.

    Raises:
        ValueError: if it names none.
    """
    name = (config.architectures or ["nothing"])[0]
    found = getattr(models, name, None) or getattr(transformers, name, None)
    if found is None:
        raise ValueError(
            f"`architectures` in config.json must name a class of transformers or hf_dynsparse. Got {name}. "
            "Save the model again by `save_pretrained`."
        )
    return found


def load_model(source: str | Path, **kwargs: Any) -> PreTrainedModel:
    """
    The model with the head that it was saved with, in evaluation mode.

    Args:
        source (`str` or `Path`): see [`load_config`].
        kwargs: passed to `from_pretrained`.
    """
    name, revision = split_revision(source)
    model: PreTrainedModel = model_class(load_config(source)).from_pretrained(name, revision=revision, **kwargs)
    return model


def copy_companions(source: str | Path, folder: Path) -> None:
    """Copy tokenizer and other small files of a saved model into `folder`, where it has none of that name."""
    name, revision = split_revision(source)
    origin = Path(name)
    if not origin.is_dir():
        origin = Path(snapshot_download(name, revision=revision, allow_patterns=list(COMPANIONS)))
    for pattern in COMPANIONS:
        for file in origin.glob(pattern):
            if file.is_file() and not (folder / file.name).exists():
                shutil.copyfile(file, folder / file.name)


@contextmanager
def written_aside(target: str | Path) -> Iterator[Path]:
    """
    A path to write a file or folder to. When the block ends it takes the name `target`; after an error, or a process
    that was killed, nothing stands there. Other files that were written beside it come along.

    Raises:
        FileExistsError: if `target` exists and is more than an empty folder.
    """
    target = Path(target)
    if target.exists() and (target.is_file() or any(target.iterdir())):
        raise FileExistsError(f"The target must not exist yet. Got {target}, which does. Choose another name.")
    aside = target.parent / f".{target.name}.incomplete"
    if aside.exists():  # of a process that was killed
        shutil.rmtree(aside)
    aside.mkdir(parents=True)
    try:
        yield aside / target.name
        flush_tree(aside)
        # The target last: where it stands, everything does.
        for written in sorted(aside.iterdir(), key=lambda path: path.name == target.name):
            os.replace(written, target.parent / written.name)
        flush(target.parent)
    finally:
        shutil.rmtree(aside)
