"""Model cards: what a model is and how it came about, from the files of its run. No figure is typed by hand."""

import re
import shutil
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import PreTrainedModel

from ..checkpoints.loading import COMPANIONS, empty_model, one_error
from ..compress.int8.embedding import Int8Embedding
from ..compress.int8.quantizer import int8_modules
from ..files import write_atomically
from ..models import DynSparseBertConfig
from ..models.bert.configuration_dynsparse_bert import count_units
from ..models.flops import inference_flops_per_sequence
from ..models.heads import body_linears, stack_name
from ..optim.recipes import FINETUNE_MODES
from .facts import EXPLORED, PICTURES, PLATEAU, read_facts, task_metrics
from .layers import LayerFacts, ModelFacts, model_facts
from .tables import markdown_table


TEMPLATE = Path(__file__).with_name("model_card.md")

# What `with_weights` puts beside a card, with what travels with any model.
MODEL_FILES = ("config.json", "summary.json", "*.safetensors", "*.safetensors.index.json")

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

# What `datasets` calls files that are no lines of text.
BUILDERS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}


def write_model_card(
    folder: str | Path,
    destination: str | Path | None = None,
    *,
    model: PreTrainedModel | None = None,
    with_weights: bool = False,
    **facts: Any,
) -> Path:
    """
    Write README.md, the card of a saved model, from what its folder holds; again at any later time.

    Args:
        folder (`str` or `Path`): config.json, and what a run has left beside it: summary.json, trainer_state.json,
            training.png, block_map.png.
        destination (`str` or `Path`, *optional*): the folder to write the card and its pictures to, if not `folder`.
        model (`PreTrainedModel`, *optional*): the model of `folder`, if it is at hand.
        with_weights (`bool`): whether `destination` gets the model too: configuration, weights, tokenizer and
            summary.json, over what stands there, so that the lines of the card load it.
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
        for file in (file for pattern in (*MODEL_FILES, *COMPANIONS) for file in source.glob(pattern)):
            if with_weights and file.is_file():
                shutil.copy(file, target)
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
    auto_class, size, int8 = auto_class_of(model), model_facts(model), int8_modules(model).values()
    needs_package = bool(size.layers or int8) or isinstance(model.config, DynSparseBertConfig)
    known = ("dynsparse", needs_package), ("block-sparse", size.layers), ("int8", int8)
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
        table=markdown_table,
        size=size,
        linears=len(body_linears(model)),
        blocks=sorted({layer.cells(" x ")[2] for layer in size.layers}),
        kinds=_kinds(size.layers),
        layers=[[f"`{name}`", *cells] for name, *cells in (layer.cells(" x ") for layer in size.layers)],
        int8=len(int8),
        int8_embeddings=any(isinstance(module, Int8Embedding) for module in int8),
        units=count_units(model.config),
        facts=facts,
        data=facts.get("data"),
        explored=explored,
        costs=_costs(model, size, facts),
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
        plateau=PLATEAU,
        training=_training(facts),
        topology=_named(facts.get("topology") or {}),
        evaluations=_table(evaluations) if len(evaluations) > 1 else [],
        pictures={name: PICTURES[name] for name in facts.get("pictures", ())},
    )


def _kinds(layers: Iterable[LayerFacts]) -> list[list[str]]:
    """A row for all layers that differ by their number alone: ranges where they differ in density, and how many."""
    kinds = defaultdict(list)
    for layer in layers:
        kinds[re.sub(r"\.\d+(?=\.|$)", ".*", layer.name), layer.shape, layer.block_shape].append(layer)
    rows = []
    for (name, *_), alike in kinds.items():
        alike.sort(key=lambda layer: layer.nnzb)
        (_, shape, block, *least), (_, _, _, *most) = (layer.cells(" x ") for layer in (alike[0], alike[-1]))
        spans = [" to ".join(dict.fromkeys(ends)) for ends in zip(least, most, strict=True)]
        rows.append([f"`{name}`", shape, block, *spans, str(len(alike))])
    return rows


def _costs(model: PreTrainedModel, size: ModelFacts, facts: Mapping[str, Any]) -> list[list[str]]:
    """
    Rows of what a model takes, what it would take with dense layers, and the share. Of a dense model its own only.

    Args:
        facts (`Mapping[str, Any]`): of its run, if known: `seq_len`, tokens of a sequence; `flops` and `tokens` of the
            training; or `dense_flops` instead of the latter.
    """
    inactive = size.positions - size.nnz
    rows: list[tuple[str, str, float, float]] = [
        ("parameters", "{:,}", size.parameters, size.dense_parameters),
        ("MB of the checkpoint", "{:,.2f}", size.bytes / 1e6, size.dense_bytes / 1e6),
    ]
    if size.layers:
        sums = (sum(getattr(layer, name) for layer in size.layers) / 1e6 for name in ("bytes", "dense_bytes"))
        rows.append(("MB of its sparse matrices", "{:,.2f}", *sums))
    if int8_modules(model):
        words = model.get_input_embeddings()
        named = next((f"{name}." for name, module in model.named_modules() if module is words), None)
        for what, part in {"encoder": stack_name(model), "word embeddings": named}.items():
            if part is not None:
                own = model_facts(model, part)
                rows.append((f"MB of its {what}", "{:,.2f}", own.bytes / 1e6, own.dense_bytes / 1e6))
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions:  # a text model of one stack, as the count of FLOPs wants it
        length = facts.get("seq_len") or min(128, positions)
        forward = inference_flops_per_sequence(model, length)
        rows.append((f"FLOPs of a forward pass, {length} tokens", "{:.4g}", forward, forward + 2 * length * inactive))
    flops = facts.get("flops") or 0
    # Where it is not known, the density was the same all the time.
    dense_flops = facts.get("dense_flops") or flops + 6 * facts.get("tokens", 0) * inactive
    if flops and dense_flops:
        rows.append(("FLOPs of the training", "{:.4g}", flops, dense_flops))
    cells = [[what, form.format(ours), form.format(dense), f"{ours / dense:.1%}"] for what, form, ours, dense in rows]
    return cells if size.layers or int8_modules(model) else [row[:2] for row in cells]


def auto_class_of(model: PreTrainedModel) -> str:
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
    # The Hub asks for a data set of its own, or for what `datasets` loads such files by.
    builder = next((BUILDERS[ending] for ending in Path(name).suffixes if ending in BUILDERS), "text")
    scores = facts.get("metrics") or last | {name: facts[name] for name in ("perplexity",) if name in facts}
    return [
        EvalResult(
            task_type=facts["pipeline_tag"],
            dataset_type=data.get("id") or builder,
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
        metrics=sorted(scores - {"loss", "context_gain", "combined_score"}) or None,
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
