"""What a page shows of a run, in plain data: read from the run's folder alone, finished or not."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...checkpoints.loading import one_error
from ...checkpoints.run_lock import lock_holder
from ...topology.frames import Frame, read_layers
from ..facts import read_facts
from ..inspection import CheckpointReport, inspect_checkpoint
from ..masks import MASK, fill_masks
from .curves import log_curves
from .maps import code_maps
from .texts import kernel_rows, setting_rows, summary_rows


FILL_BYTES = 100_000_000  # a larger model is not loaded to fill masks, unless it is asked to

# For any English model; a run on other text is asked for sentences of its own.
TEXTS = (
    f"See the documentation for more {MASK}.",
    f"If the file does not {MASK}, an error is raised.",
    f"The first {MASK} of the year was cold.",
    f"He did not {MASK} what to say.",
)


def collect_run(folder: str | Path, name: str, map_bytes: int, texts: Sequence[str] | None = None) -> dict[str, Any]:
    """
    What JSON can hold of a run, as `page.js` shows it.

    Args:
        folder (`str` or `Path`): output folder of a run, finished or going on; or a saved model.
        name (`str`): what to call it.
        map_bytes (`int`): room for its block maps; see [`code_maps`].
        texts (`Sequence[str]`, *optional*): with `[MASK]`, to be filled by its first checkpoint and by its end; by
            default a few, if the model is small.

    Raises:
        ValueError: if `folder` holds nothing of a run, or one of its files is damaged, naming it.
    """
    with one_error("The files of a run must be as it wrote them.", folder):
        return _collect(Path(folder), name, map_bytes, texts)


def _collect(folder: Path, name: str, map_bytes: int, texts: Sequence[str] | None) -> dict[str, Any]:
    steps = _checkpoint_steps(folder)
    facts = read_facts(folder)
    if steps:  # the last tells how far a run has come that goes on
        last = read_facts(folder / f"checkpoint-{steps[-1]}")
        facts = {**last, **{key: fact for key, fact in facts.items() if fact not in (None, [], {})}}
    models = {step: folder / f"checkpoint-{step}" for step in steps}
    is_saved = (folder / "config.json").exists() and any(folder.glob("*.safetensors"))
    if is_saved:
        models = dict(sorted({**models, (facts.get("steps") or 0): folder}.items()))
    history = read_layers(folder)
    holder = lock_holder(folder)
    if not (models or history or facts.get("history") or "steps" in facts or holder):
        raise ValueError(
            f"A run must have left something in its folder. Got {folder} without summary.json, trainer_state.json, "
            "checkpoint-* and topology_history. Name the --output_dir of a run."
        )
    reports = {step: inspect_checkpoint(model) for step, model in models.items()}
    report = next(reversed(reports.values()), None)
    state = "going on" if holder else "finished" if (folder / "summary.json").exists() else "not finished"
    maps, left_out = code_maps({**_saved_frames(reports), **history}, map_bytes)
    return {
        "name": name,
        "finished": state == "finished",
        "summary": summary_rows(facts, report, state),
        "settings": setting_rows(facts),
        "curves": log_curves(facts.get("history") or []),
        "layers": [[layer.name, *layer.cells(" x ")[1:4], layer.density] for layer in report.layers] if report else [],
        "maps": maps,
        "maps_left_out": left_out,
        "kernels": kernel_rows(facts.get("kernels") or []),
        **(_fill(models, report, texts) if is_saved and report else {"masks": [], "masks_note": ""}),
    }


def _checkpoint_steps(folder: Path) -> list[int]:
    names = (path.name for path in folder.glob("checkpoint-*") if path.is_dir())
    return sorted(int(found[1]) for found in map(re.compile(r"checkpoint-(\d+)").fullmatch, names) if found)


def _saved_frames(reports: dict[int, CheckpointReport]) -> dict[str, list[Frame]]:
    """What the checkpoints and the end of a run show of each layer: all there is of a run without a history."""
    frames: dict[str, list[Frame]] = {}
    for step, report in reports.items():
        for layer in report.layers:
            frames.setdefault(layer.name, []).append(Frame(layer.name, -1, step, layer.layout.to_mask().numpy()))
    return frames


def _fill(models: dict[int, Path], report: CheckpointReport, texts: Sequence[str] | None) -> dict[str, Any]:
    """The table of masks filled by the first checkpoint and the end of a run, and why there is none."""
    rows: list[list[str]] = []
    if not report.architecture.endswith(("ForMaskedLM", "ForPreTraining")):
        return {"masks": rows, "masks_note": ""}
    if texts is None and report.bytes > FILL_BYTES:
        return {"masks": rows, "masks_note": "The model is large: give sentences with --fill to have it loaded."}
    first, end = min(models), max(models)
    ends = {f"step {first:,}" if first < end else "end": models[first], "end": models[end]}
    try:
        for mask in fill_masks(ends, texts or TEXTS):
            guesses = (", ".join(f"“{piece}” {share:.0%}" for piece, share in each) for each in mask.guesses.values())
            rows.append([f"{mask.text} ({mask.number})" if mask.number > 1 else mask.text, *guesses])
    except ValueError as error:
        if texts:
            raise
        return {"masks": [], "masks_note": f"No masks were filled. {error}"}
    return {"masks": [["text", *ends], *rows], "masks_note": ""}
