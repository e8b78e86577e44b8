"""Model cards: what a model is and how it came about, from the files of its run. No figure is typed by hand."""

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import PreTrainedModel

from ..checkpoints.loading import empty_model, one_error
from ..files import write_atomically
from ..models import DynSparseBertConfig
from ..models.bert.configuration_dynsparse_bert import count_units
from ..optim.recipes import FINETUNE_MODES
from .facts import EXPLORED, PICTURES, read_facts, task_metrics
from .layers import count_costs, count_layers


TEMPLATE = Path(__file__).with_name("model_card.md")

# What a model is for, by the Auto class that loads it. Where two classes would do, the first is meant.
TASKS = {
    "AutoModelForMaskedLM": "fill-mask",
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForPreTraining": "fill-mask",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForTokenClassification": "token-classification",
    "AutoModelForQuestionAnswering": "question-answering",
    "AutoModelForMultipleChoice": "multiple-choice",
    "AutoModel": "feature-extraction",
}

# Metrics that the Hub calls otherwise than the scripts that compute them.
METRIC_TYPES = {"pearson": "pearsonr", "exact": "exact_match"}


def write_model_card(
    folder: str | Path,
    destination: str | Path | None = None,
    *,
    model: PreTrainedModel | None = None,
    **facts: Any,
) -> Path:
    """
    Write README.md, the card of a saved model, from what its folder holds; again at any later time.

    Args:
        folder (`str` or `Path`): config.json, and what a run has left beside it: summary.json, trainer_state.json,
            training.png, block_map.png.
        destination (`str` or `Path`, *optional*): the folder to write the card and its pictures to, if not `folder`.
        model (`PreTrainedModel`, *optional*): the model of `folder`, if it is at hand.
        facts: see [`create_model_card`]; they overrule those of the files.

    Returns:
        `Path`: the card.

    Raises:
        FileNotFoundError: if `folder` holds no config.json and `model` is not given.

    Example:
        ```python
        >>> write_model_card("runs/medium-s90-b16", license="apache-2.0", language="en")
        PosixPath('runs/medium-s90-b16/README.md')
        ```
    """
    source = Path(folder)
    target = source if destination is None else Path(destination)
    known = read_facts(source) | facts
    card = card_of_folder(source, empty_model(source) if model is None else model, known)
    if target != source:
        target.mkdir(parents=True, exist_ok=True)
        for picture in known["pictures"]:
            shutil.copy(source / picture, target)
    write_atomically(target / "README.md", str(card))
    return target / "README.md"


def card_of_folder(folder: str | Path, model: PreTrainedModel, facts: Mapping[str, Any]) -> ModelCard:
    """
    As [`create_model_card`], with facts that `read_facts` has read in `folder`.

    Raises:
        ValueError: if they are not what a run writes.
    """
    with one_error("The files of a run must be as it wrote them.", folder):
        return create_model_card(model, **facts)


def create_model_card(model: PreTrainedModel, **facts: Any) -> ModelCard:
    """
    The card of `model`, sparse or dense. What is not known is left out.

    Args:
        model (`PreTrainedModel`): on any device, meta included: only shapes and dtypes are read.
        facts: each of them optional. The content of summary.json, and

            - `model_name` (`str`); `repo_id` (`str`), its place on the Hub;
            - `license`, `language`, `base_model` (a name on the Hub), `pipeline_tag` (`str`), `tags` (`list[str]`);
            - `start` (`str` or `None`), what training began with, `None` for scratch: see [`describe_start`];
            - `pattern` (`str`), where the first topology came from;
            - `data` (`dict`), see [`describe_data`]; `datasets` (`list[str]`), all names on the Hub;
            - `metrics` (`dict[str, float]`), the results, if not those of the last evaluation in `history`;
            - `history` and `topology`, log and settings as in trainer_state.json;
            - `pictures` (`list[str]`), keys of `PICTURES`: files beside the card.

    Returns:
        `ModelCard`: its `validate` asks the Hub.
    """
    auto_class, layers = _auto_class(model), count_layers(model)
    needs_package = bool(layers["each"] or layers["int8"]) or isinstance(model.config, DynSparseBertConfig)
    known = ("dynsparse", needs_package), ("block-sparse", layers["each"]), ("int8", layers["int8"])
    tags = [tag for tag, fits in known if fits]
    facts = {"model_name": type(model).__name__, "pipeline_tag": TASKS.get(auto_class), **facts}
    facts["tags"] = [*tags, *(model.model_tags or ()), *facts.get("tags", ())]
    log = facts.get("history", ())
    evaluations = _evaluations(log)
    results = _results(facts, evaluations)
    explored = {name: entry[f"dynsparse/{name}"] for entry in log for name in EXPLORED if f"dynsparse/{name}" in entry}
    return ModelCard.from_template(
        _metadata(facts, results),
        template_path=str(TEMPLATE),
        model_class=type(model).__name__,
        auto_class=auto_class,
        needs_package=needs_package,
        max_tokens=getattr(model.config, "max_position_embeddings", None),
        layers=layers,
        units=count_units(model.config),
        facts=facts,
        data=facts.get("data"),
        explored=explored,
        costs=count_costs(model, facts),
        results=_table(
            {
                "data": result.dataset_name,
                "split": result.dataset_split,
                "metric": result.metric_name,
                "value": f"{result.metric_value:.4f}",
                "seed": facts.get("seed"),
            }
            for result in results
        ),
        training=_training(facts),
        topology=_named(facts.get("topology") or {}),
        evaluations=_table(evaluations) if len(evaluations) > 1 else [],
        pictures={name: PICTURES[name] for name in facts.get("pictures", ())},
    )


def _auto_class(model: PreTrainedModel) -> str:
    """The Auto class that loads `model`; else its own class."""
    for auto_class in TASKS:
        found = getattr(transformers, auto_class)._model_mapping.get(type(model.config), ())
        if type(model) in (found if isinstance(found, list | tuple) else (found,)):
            return auto_class
    return type(model).__name__


def _evaluations(log: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row for each step with an evaluation: step, the training loss logged last, scores."""
    rows: dict[int, dict[str, Any]] = {}
    loss: dict[str, Any] = {}
    for entry in log:
        if "loss" in entry:
            loss = {"training loss": entry["loss"]}
        scores = task_metrics(dict(entry))
        if scores:
            rows.setdefault(entry.get("step", 0), {"step": entry.get("step"), **loss}).update(scores)
    return list(rows.values())


def _results(facts: Mapping[str, Any], evaluations: list[dict[str, Any]]) -> list[EvalResult]:
    """What the last evaluation gave. `mm_` marks the other half of MNLI, `total` a number of questions."""
    data = facts.get("data") or {}
    name = data.get("evaluated_on") or data.get("name") or "evaluation set"
    last = {name: score for name, score in (evaluations or [{}])[-1].items() if name not in ("step", "training loss")}
    scores = facts.get("metrics") or last | {name: facts[name] for name in ("perplexity",) if name in facts}
    return [
        EvalResult(
            task_type=facts["pipeline_tag"],
            dataset_type=data.get("id") or data.get("name") or name,
            dataset_name=name,
            dataset_config=data.get("config"),
            dataset_split="validation_mismatched" if metric.startswith("mm_") else data.get("split"),
            metric_type=METRIC_TYPES.get(metric.removeprefix("mm_"), metric.removeprefix("mm_")),
            metric_name=metric.replace("_", " "),
            metric_value=float(score),
        )
        for metric, score in scores.items()
        if not metric.endswith("total")
    ]


def _metadata(facts: Mapping[str, Any], results: list[EvalResult]) -> ModelCardData:
    data = facts.get("data") or {}
    scores = {result.metric_type for result in results if result.metric_type.islower()}  # no part such as HasAns_f1
    known = bool(results and data and facts["pipeline_tag"])  # the Hub asks each result for its data and task
    return ModelCardData(
        language=facts.get("language"),
        license=facts.get("license"),
        library_name="transformers",
        pipeline_tag=facts["pipeline_tag"],
        tags=facts["tags"],
        base_model=facts.get("base_model"),
        datasets=facts.get("datasets") or ([data["id"]] if data.get("id") else None),
        metrics=sorted(scores - {"loss", "combined_score"}) or None,
        eval_results=results if known else None,
        model_name=facts["model_name"] if known else None,
    )


def _training(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    """How long, on how much and with which arguments."""
    rows: dict[str, Any] = {}
    if "mode" in facts:
        mode = facts["mode"]
        rows["mode"] = mode if mode == "dense" else f"{mode}: {FINETUNE_MODES[mode].does}"
    amounts = ("steps", "epochs", "tokens", "seq_len", "train_sequences", "eval_sequences")
    rows |= {name: facts[name] for name in amounts if name in facts}
    rows |= facts.get("arguments") or {name: facts[name] for name in ("learning_rate",) if name in facts}
    return _named(rows)


def _named(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(f"`{name}`", _text(value)) for name, value in values.items() if value is not None]


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _table(rows: Iterable[Mapping[str, Any]]) -> list[list[str]]:
    """Columns, then cells. A column that no row fills is left out; without rows there is no table."""
    rows = [{name: _text(value) for name, value in row.items() if value is not None} for row in rows]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    return [columns, *([row.get(name, "") for name in columns] for row in rows)] if rows else []
