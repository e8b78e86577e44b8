"""Models in folders and on the Hub: their class, the small files beside their weights, and writing whole or not."""

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, StrictDataclassError
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from .. import models
from .._transformers import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, cached_file, extract_commit_hash
from ..compress.int8.quantizer import METHOD as INT8_METHOD
from ..compress.int8.quantizer import DynSparseInt8Config, put_int8_layers_
from ..files import parse_object, read_object
from ..models.position_bias import restore_position_bias_
from ..models.stock.configuration import METHOD, DynSparseQuantizationConfig
from ..models.stock.quantizer import DynSparseQuantizer


# What this package reads of a config.json itself.
CONFIG_KINDS = {
    "model_type": str,
    "architectures": list[str],
    "quantization_config": dict[str, Any],
    "auto_map": dict[str, Any],
}

_RULE = f"{CONFIG_NAME} and weights must describe one model."

# What travels with a model whatever becomes of its weights: tokenizer, generation settings, licence.
COMPANIONS = (
    *("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "*.model"),
    *("chat_template*", "generation_config.json", "LICENSE*", "NOTICE*"),
)
# And what sentence-transformers reads: settings of the root, and the folders of its modules.
SENTENCE_FILES = ("modules.json", "sentence_*_config.json", "config_sentence_transformers.json", "[0-9]*_*/*")


def split_revision(source: str | Path) -> tuple[str, str]:
    """
    `"user/name@revision"` to its parts; the revision is `"main"` if none is given. A path that exists has none.
    """
    name, _, revision = str(source).rpartition("@") if "@" in str(source) else (str(source), "", "")
    return (str(source), "main") if Path(source).exists() else (name, revision or "main")


def pinned(source: str | Path) -> str:
    """
    `source` with the commit that its revision stands for now: what is read one after the other is then of one state,
    whoever pushes meanwhile. A folder stays what it is.

    Raises:
        FileNotFoundError: if there is none.
    """
    name, revision = split_revision(source)
    commit = None if Path(name).exists() else extract_commit_hash(str(_config_file(source)), None)
    return str(source) if commit is None else f"{name}@{commit or revision}"


def load_config(source: str | Path) -> PretrainedConfig:
    """
    The configuration of a saved model. Code that it names is never run.

    Args:
        source (`str` or `Path`): a folder, or a repository of the Hub as `"user/name"` or `"user/name@revision"`.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is not the configuration of a model that is known here.
    """
    file = _config_file(source)
    saved = read_object(file, CONFIG_KINDS)
    known = saved.get("model_type")
    if "model_type" in saved and known not in CONFIG_MAPPING:
        raise ValueError(
            f"`model_type` in {CONFIG_NAME} must be of transformers or hf_dynsparse; code of a repository is not run "
            f"here. Got {known!r} in {source}. Load it in Python, and save it as a model of a known type."
        )
    name, revision = split_revision(source)
    with one_error(_RULE, source):
        config: PretrainedConfig = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False)
    return config


def model_class(config: PretrainedConfig) -> Any:
    """
    The class that `config.architectures` names: one of ours or of transformers.

    Raises:
        ValueError: if it names none for such a configuration.
    """
    name = (config.architectures or ["nothing"])[0]
    found: Any = getattr(models, name, None) or getattr(transformers, name, None)
    is_model = isinstance(found, type) and issubclass(found, PreTrainedModel) and found.config_class is not None
    if not is_model or not isinstance(config, found.config_class):
        raise ValueError(
            f"`architectures` in config.json must name a class of transformers or hf_dynsparse for a "
            f"{config.model_type} model. Got {name}. Save the model again by `save_pretrained`."
        )
    return found


def empty_model(source: str | Path) -> PreTrainedModel:
    """
    A saved model on meta: its layers, sparse or int8 as it says, but no weight.

    Args:
        source (`str` or `Path`): see [`load_config`].

    Raises:
        FileNotFoundError: if there is no config.json.
        ValueError: if it describes no model.
    """
    config = load_config(source)
    architecture = model_class(config)
    with one_error(_RULE, source):
        with torch.device("meta"):
            model: PreTrainedModel = architecture(config).to(config.dtype)
        how: Any = getattr(config, "quantization_config", None)
        method = None if how is None else how.get("quant_method")
        if method == INT8_METHOD:
            put_int8_layers_(model, DynSparseInt8Config.from_dict(how))
        elif method == METHOD:
            DynSparseQuantizer(DynSparseQuantizationConfig.from_dict(how), pre_quantized=False).attach_(model)
    return model


def load_model(source: str | Path, cls: Any = None, **kwargs: Any) -> PreTrainedModel:
    """
    The model with the head that it was saved with, in evaluation mode. Code that it brings is never run.

    Args:
        source (`str` or `Path`): see [`load_config`].
        cls (*optional*): its class, if not the one that was saved.
        kwargs: passed to `from_pretrained`.
    """
    source = pinned(source)
    architecture = model_class(load_config(source)) if cls is None else cls
    name, revision = split_revision(source)
    if Path(name, SAFE_WEIGHTS_INDEX_NAME).exists():
        shard_names(Path(name, SAFE_WEIGHTS_INDEX_NAME).read_bytes(), f"{name}/{SAFE_WEIGHTS_INDEX_NAME}")
    with one_error(_RULE, source):
        model: PreTrainedModel = architecture.from_pretrained(
            name, revision=revision, trust_remote_code=False, **kwargs
        )
        restore_position_bias_(model)
    return model


def shard_names(index: bytes, place: str) -> list[str]:
    """
    The files that the index of a checkpoint in shards names, from its content.

    Raises:
        ValueError: if it is none.
    """
    content = parse_object(index, place, {"weight_map": dict[str, str]})
    names = sorted(set((content.get("weight_map") or {}).values()))
    if names and all(name.endswith(".safetensors") and name == Path(name).name for name in names):
        return names
    raise ValueError(
        f"`weight_map` in {place} must name safetensors files beside it. Got {', '.join(names[:3]) or 'none'}. Load "
        "an intact one."
    )


def load_tokenizer(source: str | Path) -> PreTrainedTokenizerBase:
    """
    The tokenizer that stands beside a saved model. Code that it brings is never run.

    Raises:
        ValueError: if there is none.
    """
    name, revision = split_revision(source)
    try:
        return AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=False)
    except (ValueError, OSError) as error:  # a paragraph on packages that might convert one
        raise ValueError(
            f"A model that reads text must have its tokenizer beside it. Got {source}. Save it there."
        ) from error


def copy_companions(
    source: str | Path, folder: Path, patterns: Sequence[str] = (*COMPANIONS, *SENTENCE_FILES)
) -> None:
    """Copy tokenizer and other small files of a saved model into `folder`, where it has none of that name."""
    name, revision = split_revision(source)
    origin = Path(name)
    if not origin.is_dir():
        origin = Path(snapshot_download(name, revision=revision, allow_patterns=list(patterns)))
    for pattern in patterns:
        for file in origin.glob(pattern):
            copy = folder / file.relative_to(origin)
            if file.is_file() and not copy.exists():
                copy.parent.mkdir(exist_ok=True)
                shutil.copyfile(file, copy)


def _config_file(source: str | Path) -> Path:
    """The config.json of a folder, or of a repository in the cache."""
    name, revision = split_revision(source)
    try:
        if Path(name).exists():
            if not Path(name, CONFIG_NAME).exists():
                raise FileNotFoundError(f"there is no {CONFIG_NAME} in it.")
            return Path(name, CONFIG_NAME)
        return Path(str(cached_file(name, CONFIG_NAME, revision=revision)))
    except (OSError, HFValidationError) as error:
        raise FileNotFoundError(
            f"A model must be a folder with a {CONFIG_NAME} or a repository of the Hub. Got {source}: {error}"
        ) from error


@contextmanager
def one_error(rule: str, source: str | Path) -> Iterator[None]:
    """
    Whatever other packages stumble over in files that somebody else may have written, as one `ValueError` that gives
    the rule they break.
    """
    try:
        yield
    except Exception as error:  # of any type: they take what they read for what it should be
        told = isinstance(error, ValueError | OSError | ImportError)
        if told and not isinstance(error, json.JSONDecodeError | UnicodeDecodeError):
            raise
        reason = f"{type(error).__name__}: {error}"
        if isinstance(error, StrictDataclassError):  # what a configuration objects to, without the validator's name
            reason = str(error.__cause__ or error)
        raise ValueError(f"{rule} Got {source}: {reason.rstrip('.')}. Load an intact one.") from error
