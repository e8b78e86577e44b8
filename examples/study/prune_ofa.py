"""Prune Once for All (arXiv:2111.05754): its stages from one plan, and the runs that they stand for."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from study.plan import Run, plan_runs, read_yaml

from hf_dynsparse.data import GLUE_TASKS


Flags = dict[str, Any]

MLM, GLUE, QA = "run_mlm_dynsparse", "run_glue_dynsparse", "run_qa_dynsparse"
TASKS = (*GLUE_TASKS, "squad")
OWN = "own"  # the task of files that are named on the command line
_TEACHING = {"distillation_weight": 1.0, "distillation_temperature": 2.0}

# Stage -> the flags that make it what it is; a plan may give others. In the order in which they run.
STAGES: dict[str, Flags] = {
    "teacher": {"dense_baseline": True},
    "prune": {
        "method": "prune_ofa",
        "learning_rate_rewinding": True,
        "distillation_weight": 0.5,
        "distillation_temperature": 2.0,
        "distillation_positions": "all",
    },
    "task_teacher": {"finetune_mode": "dense"},
    "gradual": {"finetune_mode": "gradual", "learning_rate_rewinding": True, **_TEACHING},
    "transfer": {"finetune_mode": "locked", **_TEACHING},
    "quantize": {"finetune_mode": "locked", "quantization_aware": True, **_TEACHING},
}
# The stage that prunes, where it begins with blocks that a calibration has chosen, and which stay.
CALIBRATED: dict[str, Flags] = {
    "prune": {"method": "dynsparse", "static": True, "learning_rate_rewinding": None},
    "gradual": {"finetune_mode": "locked", "learning_rate_rewinding": None},
}
# Flags of a density that falls.
GRADUAL = ("method", "topology_", "density_")
KEYS: dict[str, Any] = {
    "model_name_or_path": str,
    "defaults": dict,
    "variants": list,
    "tasks": (list, dict),
    **dict.fromkeys(STAGES, dict),
}


class StageRun(NamedTuple):
    """
    One run of one stage.

    Args:
        stage (`str`): a key of `STAGES`.
        script (`str`): the training script, without its ending.
        name (`str`): its folder inside the study.
        flags (`dict[str, Any]`): of the script, but for `output_dir`.
        needs (`tuple[str, ...]`): names of the runs whose models it reads.
        task (`str`, *optional*): what it is fine-tuned on.
        variant (`str`, *optional*): how it is pruned.
    """

    stage: str
    script: str
    name: str
    flags: Flags
    needs: tuple[str, ...] = ()
    task: str | None = None
    variant: str | None = None

    def arguments(self, output: Path) -> list[str]:
        """The flags as the command line takes them. `None` leaves one out."""
        flags = {**self.flags, "output_dir": output / self.name}
        return [f"--{flag}={value}" for flag, value in flags.items() if value is not None]


def read_prune_ofa_plan(
    file: str | Path,
    model_name_or_path: str | None = None,
    *,
    own_task: Flags | None = None,
    variant: Flags | None = None,
    calibration_samples: int | None = None,
) -> dict[str, Any]:
    """
    The plan, with what may be left out: `tasks` is a table of flags by task, `variants` a list of tables.

    Args:
        model_name_or_path (`str`, *optional*): the dense model to start from, instead of the plan's.
        own_task (`dict`, *optional*): flags that name files of one's own, for the one task `own` instead of the
            plan's. What the plan says of `own` stays.
        variant (`dict`, *optional*): instead of the plan's variants; `block_size` may be left out.
        calibration_samples (`int`, *optional*): prune at once, by so many examples, and let the pattern stay.

    Raises:
        ValueError: naming what is not as it should be.
    """
    plan = read_yaml(file)
    if not isinstance(plan, dict):
        raise ValueError(f"The plan must be a table of stages. Got {plan!r} in {file}.")
    for key, value in plan.items():
        if key not in KEYS:
            raise ValueError(f"The plan may hold {', '.join(KEYS)}. Got `{key}` in {file}.")
        if value is not None and not isinstance(value, KEYS[key]):
            raise ValueError(f"`{key}` of the plan must be a {_kind(KEYS[key])}. Got {value!r}.")
    plan = {key: {} if value is None else value for key, value in plan.items()}
    tasks, variants = plan.get("tasks", {}), plan.get("variants", [])
    if own_task:
        tasks = {OWN: {**((tasks.get(OWN) if isinstance(tasks, dict) else None) or {}), **own_task}}
    if variant:
        variants = [{**variant, "block_size": variant.get("block_size", 1)}]
    if calibration_samples is not None:
        for stage in CALIBRATED.keys() & plan.keys():
            kept = {flag: value for flag, value in plan[stage].items() if not flag.startswith(GRADUAL)}
            plan[stage] = {**kept, **CALIBRATED[stage], "calibration_samples": calibration_samples}
    plan = {
        "defaults": {},
        **plan,
        "tasks": dict.fromkeys(tasks, {}) if isinstance(tasks, list) else {task: tasks[task] or {} for task in tasks},
        "variants": variants or [{"sparsity": 0.9, "block_size": 1}],
        "model_name_or_path": model_name_or_path or plan.get("model_name_or_path"),
    }
    _check_stages(plan, file)
    _check_tables(plan)
    return plan


def plan_prune_ofa(plan: Mapping[str, Any], output: Path, data: Mapping[str, Flags]) -> list[StageRun]:
    """
    All runs of a plan, each after those that it needs.

    Args:
        plan (`Mapping[str, Any]`): what [`read_prune_ofa_plan`] gives.
        output (`Path`): folder of the study, in which a run finds the models of others.
        data (`Mapping[str, dict]`): flags that say where the data is: of `"text"`, `"glue"` and `"squad"`. Other
            tasks say it themselves.
    """
    dense = StartingPoint(str(plan["model_name_or_path"]))
    runs = []
    if "teacher" in plan:
        flags = {"model_name_or_path": plan["model_name_or_path"], **data["text"]}
        runs.append(StageRun("teacher", MLM, "teacher", _merge(plan, "teacher", flags)))
        dense = StartingPoint(str(output / "teacher"), ("teacher",))
    variants = list(plan_runs({"sweeps": plan["variants"]}))
    if "prune" in plan:
        for variant in variants:
            flags = {
                "model_name_or_path": dense.model,
                "teacher": dense.model,
                **dict(variant.settings),
                **data["text"],
            }
            name = f"{variant.name}/prune"
            runs.append(StageRun("prune", MLM, name, _merge(plan, "prune", flags), dense.needs, None, variant.name))
    for task in plan["tasks"]:
        runs += _task_runs(plan, task, variants, dense, output, data)
    return sorted(runs, key=lambda run: list(STAGES).index(run.stage))


class StartingPoint(NamedTuple):
    """A model, and the runs that make it."""

    model: str
    needs: tuple[str, ...] = ()


def _task_runs(
    plan: Mapping[str, Any],
    task: str,
    variants: list[Run],
    dense: StartingPoint,
    output: Path,
    data: Mapping[str, Flags],
) -> list[StageRun]:
    """The dense model of one task, and the pruned ones that learn from it."""
    script = QA if task == "squad" else GLUE
    glue = {"task_name": task, **data["glue"]} if task in GLUE_TASKS else {}  # else its flags name its files
    where = data["squad"] if task == "squad" else glue
    teacher = f"task_teacher/{task}"
    runs: list[StageRun] = []

    def add(stage: str, start: StartingPoint, variant: Run | None = None, **flags: Any) -> StartingPoint:
        name = f"{variant.name}/{stage}/{task}" if variant else teacher
        learns = {"teacher": output / teacher} if variant else {}
        needs = tuple(dict.fromkeys((*start.needs, teacher))) if variant else start.needs
        flags = _merge(plan, stage, {"model_name_or_path": start.model, **learns, **flags, **where}, task)
        runs.append(StageRun(stage, script, name, flags, needs, task, variant and variant.name))
        return StartingPoint(str(output / name), (name,))

    add("task_teacher", dense)
    for variant in variants:
        pruned = StartingPoint(str(output / variant.name / "prune"), (f"{variant.name}/prune",))
        if "gradual" in plan:
            # What is chosen and fitted at once is the model of the task.
            start = StartingPoint(str(output / teacher)) if plan["gradual"].get("calibration_samples") else dense
            pruned = add("gradual", start, variant, **dict(variant.settings))
        locked = add("transfer", pruned, variant)
        if "quantize" in plan:
            add("quantize", locked, variant)
    return runs


def _merge(plan: Mapping[str, Any], stage: str, links: Flags, task: str | None = None) -> Flags:
    """The flags of a run: of the method, of all stages, of this one, of the task, of the task at this stage, links."""
    of_task = plan["tasks"][task] if task else {}
    everywhere = {flag: value for flag, value in of_task.items() if flag not in STAGES}
    return {**STAGES[stage], **plan["defaults"], **plan[stage], **everywhere, **(of_task.get(stage) or {}), **links}


def _check_stages(plan: Mapping[str, Any], file: str | Path) -> None:
    """Refuse stages that lack what they build on."""
    if "teacher" not in plan and not plan["model_name_or_path"]:
        raise ValueError(
            "The plan must begin with a dense model: a stage `teacher`, or `model_name_or_path`. "
            f"Got neither in {file}. Give one."
        )
    given = [stage for stage in STAGES if stage in plan]
    ways = [stage for stage in ("prune", "gradual") if stage in plan]
    if len(ways) != 1:
        raise ValueError(
            "The plan must prune once: by `prune` before all tasks, or by `gradual` at each. "
            f"Got {' and '.join(ways) or 'neither'} in {file}."
        )
    needed = {"gradual": ["task_teacher", "transfer"], "transfer": ["task_teacher"], "quantize": ["transfer"]}
    if plan["tasks"]:
        needed |= dict.fromkeys(ways, ["task_teacher", "transfer"])
    for stage in given:
        for other in needed.get(stage, []):
            if other not in plan:
                raise ValueError(f"Stage `{stage}` needs stage `{other}`. Got {', '.join(given)} in {file}. Add it.")
    if not plan["tasks"] and "task_teacher" in plan:
        raise ValueError(
            f"Stage `task_teacher` needs `tasks`. Got none in {file}. Give a list such as [sst2, squad], or files of "
            "your own by --task_train_file and --task_validation_file."
        )


def _check_tables(plan: Mapping[str, Any]) -> None:
    """Refuse tasks and variants that are none."""
    for task, flags in plan["tasks"].items():
        if not isinstance(flags, dict) or not all(isinstance(flags.get(stage) or {}, dict) for stage in STAGES):
            raise ValueError(f"The flags of a task must be a table, by stage if need be. Got {flags!r} for {task}.")
        if task not in TASKS and not {"train_file", "validation_file"} <= flags.keys():
            raise ValueError(
                f"A task must be one of {', '.join(TASKS)}. Got {task!r}. One of your own needs a train_file and a "
                "validation_file."
            )
        if not re.fullmatch(r"\w[\w.-]*", str(task)):
            raise ValueError(f"The name of a task is that of a folder: letters, digits, `-` and `_`. Got {task!r}.")
    for variant in plan["variants"]:
        if not isinstance(variant, dict) or "sparsity" not in variant:
            raise ValueError(
                "A variant must be a table with a sparsity, such as {sparsity: [0.85, 0.9], block_size: 1x4}. "
                f"Got {variant!r}."
            )


def _kind(kinds: Any) -> str:
    names = {str: "word", dict: "table", list: "list"}
    return " or a ".join(names[kind] for kind in (kinds if isinstance(kinds, tuple) else (kinds,)))
