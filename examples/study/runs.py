"""Finished runs of a study: what the plan says, what the run recorded, and what a step takes. Reads files only."""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import fmean, median
from typing import Any

from hf_dynsparse.topology import TopologyOptions
from hf_dynsparse.topology.settings import OLD_NAMES


# Topology arguments that a run records.
TOPOLOGY = {option.name for option in fields(TopologyOptions)} - {"method", "seed"} | {"group_lasso"}
RESULTS = (
    *("eval_loss", "context_gain", "plateau_left_tokens"),
    *("flops", "dense_flops", "steps", "tokens", "epochs", "coverage", "topology_updates"),
    *("encoder_bytes", "dense_encoder_bytes", "checkpoint_bytes", "hardware"),
)


@dataclass(frozen=True)
class StudyRun:
    """
    A finished run.

    Args:
        folder (`Path`): where it stands.
        plan (`Mapping[str, Any]`): the settings that the plan gives it.
        settings (`Mapping[str, Any]`): those and the ones that it recorded itself; `method` is `"dense"` for the twin.
        results (`Mapping[str, Any]`): `eval_loss` and `context_gain` (nats), `flops`, `seconds`, `coverage`,
            `newborn_share`, bytes, and where it was computed.
    """

    folder: Path
    plan: Mapping[str, Any]
    settings: Mapping[str, Any]
    results: Mapping[str, Any]

    @property
    def row(self) -> dict[str, Any]:
        """All of it in one flat dictionary."""
        return {"name": self.folder.name, **self.settings, **self.results}


def read_run(folder: str | Path, plan: Mapping[str, Any], step_seconds: "StepSeconds | None" = None) -> StudyRun:
    """
    A finished run of run_mlm_dynsparse.py, from its summary.json, config.json and trainer_state.json.

    Args:
        plan (`Mapping[str, Any]`): its settings in the plan.
        step_seconds (`StepSeconds`, *optional*): of its configuration, timed with nothing else running. Without it the
            time is what the run itself took, whatever ran beside it.
    """
    folder = Path(folder)
    summary, config, state = (
        json.loads((folder / f"{name}.json").read_text()) for name in ("summary", "config", "trainer_state")
    )
    log = state["log_history"]
    results = {name: summary.get(name) for name in RESULTS}
    results["sparsity_reached"] = summary["sparsity"]
    results["data"] = json.dumps(summary.get("data"), sort_keys=True)
    results["newborn_share"] = mean_newborn_share(log)
    results["seconds"] = step_seconds.of(summary) if step_seconds else summary["seconds"]
    results["seconds_from"] = "timed alone" if step_seconds else "the run itself"
    results["versions"] = ", ".join(f"{name} {version}" for name, version in summary["versions"].items())
    return StudyRun(folder, plan, _settings(plan, summary, config, state), results)


def _settings(plan: Mapping[str, Any], *files: Mapping[str, Any]) -> dict[str, Any]:
    """The plan's, completed by what the run recorded, so that a default and the same value given are one setting."""
    summary, config, state = files
    settings: dict[str, Any] = {
        "seed": summary["seed"],
        "learning_rate": float(f"{summary['learning_rate']:.6g}"),  # rules round in ways of their own
        "method": "dynsparse",
    }
    settings |= plan
    if settings["method"] == "dense":
        return settings | {"sparsity": 0.0, "block_size": None}
    own = summary | config  # other architectures than ours have neither in their configuration
    settings["sparsity"] = float(plan.get("sparsity", own["sparsity"]))
    settings["block_size"] = str(plan.get("block_size", own["block_size"]))
    recorded = state.get("stateful_callbacks", {}).get("TopologyCallback", {}).get("args", {})
    recorded = {OLD_NAMES.get(name, name): value for name, value in recorded.items()}
    if summary["topology_updates"]:
        constant = recorded.get("density_schedule", "constant") == "constant"
        for name in sorted(TOPOLOGY):
            if not (constant and name.startswith("density")):
                settings.setdefault(name, recorded.get(name) or None)  # what is off is as if not there
        if settings["topology_update_every"] is None:
            settings["num_topology_updates"] = summary["topology_updates"]
    return settings


def mean_newborn_share(log_history: Iterable[Mapping[str, Any]]) -> float | None:
    """
    Share of the removed blocks that the update before had activated, mean over the logged updates but the first, of
    which none is new (section 6); `None` without such updates.
    """
    shares = {
        entry["dynsparse/topology_updates"]: entry["dynsparse/newborn_share"]
        for entry in log_history
        if entry.get("dynsparse/topology_updates", 0) > 1
    }
    return fmean(shares.values()) if shares else None


@dataclass(frozen=True)
class StepSeconds:
    """
    What a configuration takes when it has the machine for itself.

    Args:
        step (`float`): seconds of a usual optimiser step, the median.
        update (`float`): seconds that a topology update adds to its step, the mean.
    """

    step: float
    update: float

    def of(self, summary: Mapping[str, Any]) -> float:
        """Seconds of the run of this summary."""
        return float(self.step * summary["steps"] + self.update * summary["topology_updates"])


def read_step_seconds(folder: str | Path, skip: float = 0.1) -> StepSeconds:
    """
    The time of steps and updates, from a run that logged every step of a constant number of tokens.

    Args:
        skip (`float`): share of the steps at the start that are left out: caches and kernels are not warm yet.
    """
    summary, state = (json.loads(Path(folder, f"{name}.json").read_text()) for name in ("summary", "trainer_state"))
    entries = [entry for entry in state["log_history"] if "loss" in entry]
    tokens = summary["tokens"] / summary["steps"]
    # The log has the throughput since the start.
    elapsed = [tokens * entry["step"] / entry["dynsparse/tokens_per_second"] for entry in entries]
    updates = [entry.get("dynsparse/topology_updates", 0) for entry in entries]
    usual: list[float] = []
    updating: list[float] = []
    for place in range(max(1, math.ceil(skip * len(entries))), len(entries)):
        kind = usual if updates[place] == updates[place - 1] else updating
        kind.append(elapsed[place] - elapsed[place - 1])
    if not usual:
        raise ValueError(
            f"A timed run must have steps without a topology update. Got {len(entries)} steps in {folder}. Time more."
        )
    step = median(usual)
    return StepSeconds(step, max(0.0, fmean(updating) - step) if updating else 0.0)
