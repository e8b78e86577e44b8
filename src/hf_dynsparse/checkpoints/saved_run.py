"""`SavedRun`: what a checkpoint folder says of its run and model, and whether a run may go on from it."""

import json
import logging
import os
import re
import zlib
from collections.abc import Collection, Mapping
from contextlib import suppress
from fnmatch import filter as matching
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel, TrainerState

from .._transformers import TRAINER_STATE_NAME, get_last_checkpoint
from ..files import read_object
from ..models.checksums import open_weights, verify_weights
from ..models.density import sizes_of
from ..nn.linear import TRAINING_BUFFER, trainable_layers
from ..topology.resize import set_size_


logger = logging.getLogger(__name__)

# Not named checkpoint-*: nothing that looks for the last checkpoint may find a half-written one.
STAGING_FOLDER = "incomplete-save"

# What a resumed run reads beside the weights, which carry checksums of their own; and the file with theirs.
NEEDED_STATE = (TRAINER_STATE_NAME, "optimizer.pt", "scheduler.pt", "rng_state*.pth")
STATE_FILES = (*NEEDED_STATE, "scaler.pt")
CHECKSUM_FILE = "checksums.json"

# Fields of a BERT's configuration that a resumed run must share with its checkpoint.
_MODEL_FIELDS = (
    *("sparsity", "block_size", "distribution"),
    *("hidden_size", "num_hidden_layers", "intermediate_size"),
)
# Fields that the tokenizer fills, or saving does, or the Trainer.
_NOT_OF_THE_MODEL = frozenset(
    {
        "vocab_size",
        "architectures",
        "dtype",
        "transformers_version",
        "quantization_config",
        "_name_or_path",
        "use_cache",
    }
)
_FIX = "The checkpoint is damaged, or was changed afterwards: resume from another."


class SavedRun:
    """
    A checkpoint of a run. What it holds is read when first asked for, and once.

    Args:
        folder (`str` or `Path`): the checkpoint.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    @cached_property
    def state(self) -> TrainerState:
        """The state of the Trainer, from `trainer_state.json`."""
        return TrainerState.load_from_json(str(self.folder / TRAINER_STATE_NAME))

    @cached_property
    def shapes(self) -> dict[str, list[int]]:
        """The shapes of all tensors in the weight files; empty if there is no such file, as beside an adapter."""
        shapes: dict[str, list[int]] = {}
        for file in weight_files(self.folder):
            with open_weights(file) as weights:
                shapes |= {name: weights.get_slice(name).get_shape() for name in list(weights.keys())}
        return shapes

    @property
    def given_sizes(self) -> dict[str, int] | None:
        """Active blocks of each layer of the model that the run was given; `None` unless the run changes them."""
        kept: Any = self.state.stateful_callbacks
        attributes = [saved.get("attributes", {}) for saved in kept.values() if isinstance(saved, dict)]
        return next((found["final"]["sizes"] for found in attributes if found.get("final")), None)

    @property
    def quantize_embeddings(self) -> bool:
        """Whether word embeddings are rounded in quantisation-aware training. By earlier versions: not by default."""
        config = self.folder / "config.json"
        return config.is_file() and bool(read_object(config).get("quantize_embeddings", False))

    def sizes(self, model: nn.Module) -> dict[str, int]:
        """Active blocks that the sparse layers of `model` have in this checkpoint."""
        names = trainable_layers(model)
        return {name: self.shapes[f"{name}.values"][0] for name in names if f"{name}.values" in self.shapes}

    def check_training_state(self, needed: Collection[str] = NEEDED_STATE) -> None:
        """
        Check that the training state is there and as it was saved: the Trainer would go on without moments if they
        are missing, and would not notice other numbers. A whole one without checksums passes with a line in the log.

        Args:
            needed (collection of `str`): names, or patterns of names, of the files without which it is not whole.

        Raises:
            ValueError: naming the file that is missing or damaged.
        """
        lacking = lacking_file(self.folder, needed)
        if lacking is not None:
            raise ValueError(
                f"A resumed run needs its whole training state. Got {self.folder} without {lacking}. {_FIX} Of one "
                "with weights alone, take those for the start of a new run."
            )
        list_file = self.folder / CHECKSUM_FILE
        if not list_file.is_file():
            logger.warning("%s carries no checksums of its training state, which is taken as it is.", self.folder)
            return
        try:
            saved = dict(json.loads(list_file.read_text(encoding="utf-8")))
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(f"Checksums must be a table. Got {list_file}, which is none: {error}. {_FIX}") from error
        files = {file.name: file for file in self.folder.iterdir()}
        unlisted = {name for pattern in STATE_FILES for name in matching(files, pattern)} - saved.keys()
        if unlisted:
            raise ValueError(
                f"Checksums must cover all training state. Got {list_file} without {min(unlisted)}. {_FIX}"
            )
        for name, checksum in saved.items():
            if name not in files:
                raise ValueError(
                    f"A resumed run needs its whole training state. Got {self.folder} without {name}. {_FIX}"
                )
            if (got := file_checksum(files[name])) != checksum:
                raise ValueError(
                    f"A resumed run needs its training state as it was saved. Got {files[name]} with checksum {got} "
                    f"instead of {checksum}. {_FIX}"
                )

    def check_weights(self) -> None:
        """
        Check that the weights are what was saved; see [`verify_weights`].

        Raises:
            ValueError: naming tensor and file, or a pickle in the place of safetensors.
        """
        files = weight_files(self.folder)
        pickles = sorted(self.folder.glob("pytorch_model*.bin"))
        if pickles and not files:
            raise ValueError(f"The weights of a checkpoint must be safetensors. Got {pickles[0]}, a pickle. {_FIX}")
        verify_weights(files)

    def check_config(self, config: PretrainedConfig) -> None:
        """
        Refuse a configuration of another model before it is built.

        Raises:
            ValueError: naming the first field that differs.
        """
        both = config, AutoConfig.from_pretrained(self.folder)
        given, saved = (json.loads(each.to_json_string(use_diff=False)) for each in both)
        names = ["model_type", *(_MODEL_FIELDS if "nnzb" in given else sorted(given))]
        for name in names:
            if name in _NOT_OF_THE_MODEL or name.endswith("_token_id"):
                continue
            if saved.get("nnzb") is not None and name in ("sparsity", "distribution"):
                continue  # half-way through a density schedule: the trainer knows where it leads
            if given[name] != saved.get(name):
                raise ValueError(
                    f"A resumed run must have the model of its checkpoint. Got {name} = {given[name]}, but "
                    f"{self.folder} has {saved.get(name)}. Give that, or another --output_dir."
                )

    def check_model(self, model: nn.Module, given: Mapping[str, int] | None = None) -> None:
        """
        Refuse to go on with another model: the Trainer would take the weights whose names agree, and leave the others
        as they are.

        Args:
            given (`Mapping[str, int]`, *optional*): active blocks of each sparse layer of `model` before a run changed
                them. Default: those that they have.

        Raises:
            ValueError: naming the first tensor that the checkpoint lacks, or has in another shape, or a file that
                cannot be read. Where the run changes the number of active blocks, `given` must be what it was started
                with, or the sizes of `model` those of the checkpoint.
        """
        if isinstance(model, PreTrainedModel):
            self._check_tensors(model)
        expected, given = self.given_sizes, sizes_of(model) if given is None else given
        if expected is None or given == expected or sizes_of(model) == self.sizes(model):
            return
        name = next(name for name in given if given[name] != expected.get(name))
        raise ValueError(
            f"A resumed run must have the model of its checkpoint. Got `{name}` with {given[name]} active blocks, but "
            f"the run of {self.folder} was given one with {expected.get(name, 'none')}. Start from the same model, "
            "with the same sparsity, block size and distribution, or write to a new folder."
        )

    def _check_tensors(self, model: PreTrainedModel) -> None:
        tied = {*model.all_tied_weights_keys, *model.all_tied_weights_keys.values()}
        resized = () if self.given_sizes is None else trainable_layers(model)
        by_block = {f"{name}.{part}" for name in resized for part in ("values", "block_index")}
        for name, tensor in model.state_dict().items():
            # A run that does not record something may be followed by one that does.
            if not self.shapes or name in tied or re.search(TRAINING_BUFFER, name):
                continue
            first = int(name in by_block)  # the number of blocks, [nnzb, rows, columns] or [nnzb], may differ
            if name not in self.shapes or self.shapes[name][first:] != list(tensor.shape[first:]):
                theirs = tuple(self.shapes[name]) if name in self.shapes else "none"
                raise ValueError(
                    f"A resumed run must have the model of its checkpoint. Got `{name}` of shape "
                    f"{tuple(tensor.shape)}, but {self.folder} has {theirs}. Start from the same model, with the same "
                    "sparsity, block size and fine-tuning mode, or write to a new folder."
                )

    def resize_(self, model: nn.Module, optimizer: Optimizer | None) -> None:
        """
        Give the sparse layers of `model`, and their moments in `optimizer`, the sizes that they have in this
        checkpoint, which is loaded next.
        """
        layers = trainable_layers(model)
        for name, nnzb in self.sizes(model).items():
            set_size_(layers[name], nnzb, optimizer=optimizer)


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
    last = last_checkpoint(output_dir)
    if resume_from_checkpoint == "last":
        return last
    if resume_from_checkpoint is not None:
        if not (Path(resume_from_checkpoint) / TRAINER_STATE_NAME).is_file():
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


def last_checkpoint(run_dir: str | Path) -> str | None:
    """The newest complete checkpoint in `run_dir`, if there is any."""
    put_back_replaced(run_dir)
    return get_last_checkpoint(str(run_dir)) if Path(run_dir).is_dir() else None


def put_back_replaced(run_dir: str | Path) -> None:
    """Undo a save that was interrupted after it had moved an older checkpoint of its name aside."""
    for replaced in Path(run_dir, STAGING_FOLDER).glob("*.replaced"):
        if not Path(run_dir, replaced.stem).exists():
            with suppress(FileNotFoundError):  # another rank was faster
                os.replace(replaced, Path(run_dir, replaced.stem))


def weight_files(checkpoint: str | Path) -> list[Path]:
    """The safetensors files of the weights of a checkpoint: one, or shards."""
    return sorted(Path(checkpoint).glob("model*.safetensors"))


def lacking_file(folder: str | Path, needed: Collection[str]) -> str | None:
    """The first of the `needed` names, or patterns of names, that no file in `folder` has, without its stars."""
    missing = (pattern for pattern in needed if not any(Path(folder).glob(pattern)))
    return next((pattern.replace("*", "") for pattern in missing), None)


def file_checksum(file: Path) -> str:
    """CRC-32, as of the weights."""
    checksum = 0
    with file.open("rb") as content:
        while chunk := content.read(1 << 24):
            checksum = zlib.crc32(chunk, checksum)
    return f"{checksum:08x}"
