"""Facts of a model, a run and its machine, for cards, summaries and tables."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from .._transformers import TRAINER_STATE_NAME
from ..files import Kinds, check_object, read_object
from ..ops.tuning import processor_name
from .inspection import read_header
from .layers import model_facts


PICTURES = {
    "training.png": "Loss, and exploration of the topology if it evolved, against training FLOPs",
    "block_map.png": "Blocks of one layer: at the start, wherever one was active, at the end",
    "ticket.png": "Attention heads by their gates, and the intermediate neurons of each layer that stay",
}

PAGE_FILE = "report.html"  # what `hf-dynsparse report` writes into the folder of a run
LOG_FILE = "log.jsonl"  # the log of a run, a line an entry, while it goes on and after

PLATEAU = 0.1  # nats of context gain under which a model is hardly better than the frequencies of pieces

EXPLORED = ("coverage", "topology_updates")
LOGGED = (*EXPLORED, "newborn_share", "pruning_ratio", "sparsity", "flops", "tokens", "tokens_per_second")

# What is read of the files of a run.
STATE_KINDS: Kinds = {
    "global_step": int,
    "total_flos": float,
    "log_history": list[dict[str, Any]],
    "stateful_callbacks": dict[str, Any],
}

LOG_KINDS: Kinds = {
    **{"step": int, "loss": float, "learning_rate": float},
    **{f"dynsparse/{name}": float for name in LOGGED},
}

CALLBACK_KINDS: Kinds = dict.fromkeys(("TopologyCallback", "KernelCallback"), dict[str, dict[str, Any]])

SUMMARY_KINDS: Kinds = {
    **dict.fromkeys(("steps", "seq_len", "topology_updates", "train_sequences", "eval_sequences", "processes"), int),
    **dict.fromkeys(("flops", "dense_flops", "tokens", "epochs", "seconds", "tokens_per_second"), float),
    **dict.fromkeys(("context_gain", "plateau_left_tokens", "plateau_left_seconds"), float),
    **dict.fromkeys(("perplexity", "eval_loss", "pruned_to", "learning_rate", "seed"), float),
    **dict.fromkeys(("model_name", "repo_id", "license", "base_model", "pipeline_tag", "start", "pattern"), str),
    **dict.fromkeys(("teacher", "hardware", "mode"), str),
    "language": str | list[str],
    **dict.fromkeys(("tags", "datasets", "pictures"), list[str]),
    "data": dict[str, str | None],
    "metrics": dict[str, float],
    "collapsed": bool,
    "arguments": dict[str, Any],
    "versions": dict[str, str],
    "history": list[dict[str, Any]],
    "earlybert": dict[str, Any],
}


def read_facts(folder: Path) -> dict[str, Any]:
    """What the files of a run tell about it; for a model without a run its name."""
    facts: dict[str, Any] = {"model_name": folder.resolve().name}
    facts["pictures"] = [name for name in PICTURES if (folder / name).exists()]
    state_file, summary_file = folder / TRAINER_STATE_NAME, folder / "summary.json"
    if state_file.exists():
        state = read_object(state_file, STATE_KINDS)
        callbacks = check_object(state.get("stateful_callbacks") or {}, str(state_file), CALLBACK_KINDS)
        facts |= {"steps": state.get("global_step"), "flops": state.get("total_flos")}
        facts["history"] = _checked(state.get("log_history") or [], state_file)
        facts["topology"] = (callbacks.get("TopologyCallback") or {}).get("args")
        kernels = (callbacks.get("KernelCallback") or {}).get("attributes") or {}
        facts["kernels"] = check_object(kernels, str(state_file), {"choices": list[dict[str, Any]]}).get("choices")
    if (folder / LOG_FILE).exists():
        facts["history"] = _checked(_read_log(folder / LOG_FILE), folder / LOG_FILE)
        facts.setdefault("steps", max((entry.get("step", 0) for entry in facts["history"]), default=0))
    if summary_file.exists():
        facts |= read_object(summary_file, SUMMARY_KINDS)
    return facts


def _read_log(file: Path) -> list[Any]:
    """All entries but one that is being written, or was when the run was killed: its line has no end."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines(True) if line.endswith("\n")]


def _checked(log: list[dict[str, Any]], file: Path) -> list[dict[str, Any]]:
    for entry in log:
        scores: Kinds = {name: float for name in entry if name.startswith("eval_")}
        check_object(entry, f"the log of {file}", {**LOG_KINDS, **scores})
    return log


def seconds_so_far(entry: Mapping[str, Any]) -> float | None:
    """Spent in optimiser steps until this entry of a log; `None` if it does not tell."""
    rate = entry.get("dynsparse/tokens_per_second")
    return entry["dynsparse/tokens"] / rate if rate else None


def describe_start(name_or_path: str | None) -> dict[str, Any]:
    """The facts about what training began with: nothing, a folder, or a model on the Hub."""
    if name_or_path is None or Path(name_or_path).exists():
        return {"start": name_or_path and Path(name_or_path).resolve().name}
    return {"start": name_or_path, "base_model": name_or_path}


def describe_data(
    name: str, *, config: str | None = None, split: str | None = "validation", evaluated_on: str | None = None
) -> dict[str, Any]:
    """
    The fact `data`.

    Args:
        name (`str`): a data set on the Hub, or a file or folder.
        config, split (`str`, *optional*): its configuration, and the split that the results are for.
        evaluated_on (`str`, *optional*): what to call the data of the results, if `name` does not.
    """
    local = Path(name).exists()
    data = {"name": Path(name).resolve().name} if local else {"name": name, "id": name, "config": config}
    return data | {"split": split, "evaluated_on": evaluated_on}


def trainer_facts(
    language: str | None = None,
    license: str | None = None,
    tags: str | list[str] | None = None,
    model_name: str | None = None,
    finetuned_from: str | None = None,
    tasks: str | list[str] | None = None,
    dataset_tags: str | list[str] | None = None,
    dataset: str | list[str] | None = None,
    dataset_args: str | list[str] | None = None,
) -> dict[str, Any]:
    """The facts in the arguments of [`~transformers.Trainer.create_model_card`]."""

    def listed(given: str | list[str] | None) -> list[Any]:
        return [given] if isinstance(given, str) else given or []

    ids, names, configs = listed(dataset_tags), listed(dataset), listed(dataset_args)
    first = {"name": names or ids, "id": ids, "config": configs}
    facts = {
        "language": language,
        "license": license,
        "tags": listed(tags),
        "model_name": model_name,
        "base_model": finetuned_from,
        "pipeline_tag": next(iter(listed(tasks)), None),
        "datasets": ids,
        "data": {key: values[0] for key, values in first.items() if values},
    }
    return {name: fact for name, fact in facts.items() if fact}


def checkpoint_bytes(folder: str | Path, part: str = "") -> int:
    """
    Bytes of the tensors in the safetensors files of `folder` whose name contains `part`. Only headers are read.

    Raises:
        FileNotFoundError: if there is no safetensors file.
        ValueError: if one is damaged.
    """
    files = sorted(Path(folder).glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"A saved model must hold *.safetensors files. Got none in {folder}.")
    total = 0
    for path in files:
        with path.open("rb") as file:
            places = read_header(file, path.stat().st_size, str(path))
        total += sum(place.bytes for name, place in places.items() if part in name)
    return total


def dense_bytes(model: PreTrainedModel, part: str = "") -> int:
    """Bytes of the parameters of the same model with dense layers whose name contains `part`, tied ones once."""
    return model_facts(model, part).dense_bytes


def task_metrics(metrics: dict[str, float], prefix: str = "eval_") -> dict[str, float]:
    """The scores among the metrics of an evaluation, without their prefix: no times, no steps, no topology."""
    return {
        name.removeprefix(prefix): value
        for name, value in metrics.items()
        if name.startswith(prefix) and not any(word in name for word in ("runtime", "per_second", "collapsed"))
    }


def describe_hardware(device: torch.device) -> str:
    """Name of the GPU, or of the CPU with the number of threads in use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{processor_name()}, {counted(torch.get_num_threads(), 'thread')}"


def counted(number: int, noun: str) -> str:
    """`1 thread`, `2 threads`."""
    return f"{number} {noun}{'' if number == 1 else 's'}"
