"""The files beside an encoder by which sentence-transformers makes sentence embeddings of its hidden states."""

import json
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

from ..files import fits, read_object, write_atomically
from .loading import SENTENCE_FILES, copy_companions


MODULES, POOLING = "modules.json", "1_Pooling"

# Our names of poolings, and their flags in the configuration of that module.
FLAGS = {
    "cls": "pooling_mode_cls_token",
    "mean": "pooling_mode_mean_tokens",
    "max": "pooling_mode_max_tokens",
    "mean_sqrt_len": "pooling_mode_mean_sqrt_len_tokens",
}


def sentence_files(name: str, revision: str = "main", **hub: Any) -> Path | None:
    """The folder with such files of a saved model, in a folder or on the Hub; `None` if it has none."""
    folder = Path(name)
    if not folder.is_dir():
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=list(SENTENCE_FILES), **hub))
    return folder if (folder / MODULES).is_file() else None


def find_pooling(folder: Path) -> str:
    """
    How the encoder of a folder with sentence files pools: `"mean"`, `"cls"`, `"max"` or another name.

    Raises:
        ValueError: if its first two modules are not an encoder and a pooling of one kind.
    """
    file = folder / MODULES
    try:
        modules = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        modules = None
    if not fits(modules, list[dict[str, Any]]):
        raise ValueError(f"{file} must be a list of modules. Got something else. Load an intact one.")
    kinds = [str(module.get("type")).rpartition(".")[2] for module in modules]
    if kinds[:2] != ["Transformer", "Pooling"]:
        raise ValueError(
            f"A sentence encoder must begin with a Transformer and a Pooling. Got {', '.join(kinds)} in {file}. Give "
            "another checkpoint."
        )
    file = folder / Path(str(modules[1].get("path"))).name / "config.json"
    settings = read_object(file)
    names = {flag: name for name, flag in FLAGS.items()}
    chosen = [flag for flag, value in settings.items() if flag.startswith("pooling_mode_") and value is True]
    # A single name in newer files.
    modes = [names.get(flag, flag) for flag in chosen] or [*filter(None, [settings.get("pooling_mode")])]
    if len(modes) != 1:
        raise ValueError(
            f"A sentence encoder must pool in one way. Got {', '.join(modes) or 'none'} in {file}. Give another."
        )
    return str(modes[0])


def write_sentence_files(target: Path, source: Path | None, *, pooling: str, width: int, max_seq_length: int) -> None:
    """
    Put sentence files beside a saved encoder: those of `source`, all its modules among them, or new ones.

    Args:
        target (`Path`): the folder of the encoder.
        source (`Path`, *optional*): see [`sentence_files`].
        pooling (`str`): a key of `FLAGS`, for new ones.
        width (`int`): of an embedding.
        max_seq_length (`int`): tokens at which a sentence is cut.
    """
    if source is not None:
        copy_companions(source, target, SENTENCE_FILES)
        return
    kinds = {"": "Transformer", POOLING: "Pooling"}
    modules = [
        {"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for number, (path, kind) in enumerate(kinds.items())
    ]
    flags = {flag: name == pooling for name, flag in FLAGS.items()}
    contents = {
        MODULES: modules,
        "sentence_bert_config.json": {"max_seq_length": max_seq_length, "do_lower_case": False},
        f"{POOLING}/config.json": {"word_embedding_dimension": width, **flags},
    }
    for name, content in contents.items():
        write_atomically(target / name, json.dumps(content, indent=2) + "\n")
