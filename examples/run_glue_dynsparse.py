#!/usr/bin/env python
"""
Fine-tune a sparse or dense encoder on a GLUE task, or on sentences of your own.

    # a sparse checkpoint, pattern fixed; official GLUE files in glue_data/SST-2, glue_data/CoLA, ...
    accelerate launch examples/run_glue_dynsparse.py \
        --model_name_or_path runs/medium-s90-b16 --task_name sst2 --glue_dir glue_data --output_dir runs/sst2
    # the same pattern made dense, or evolving
    accelerate launch examples/run_glue_dynsparse.py ... --finetune_mode dense
    # a fine-tuned model trained on with 8 bits, and saved as an int8 model (see docs/int8.md)
    accelerate launch examples/run_glue_dynsparse.py ... --quantization_aware --teacher runs/sst2-dense
    # a dense BERT made sparse by its largest blocks, learning from the dense one
    accelerate launch examples/run_glue_dynsparse.py \
        --model_name_or_path bert-base-uncased --sparsity 0.8 --block_size 4 --teacher runs/sst2-dense ...
    # your own sentences: columns sentence1, sentence2 (or one text column) and label
    accelerate launch examples/run_glue_dynsparse.py --train_file train.csv --validation_file valid.csv ...

Writes into the output folder: model and tokenizer, README.md (a card), all_results.json, summary.json, training.png,
and predictions of the test set with --do_predict.
"""

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets import Dataset, DatasetDict, load_dataset
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    DataCollatorWithPadding,
    EvalPrediction,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)

from hf_dynsparse import DynSparseTrainer, topology_summary
from hf_dynsparse.blocks.sizes import parse_block_size
from hf_dynsparse.data import GLUE_TASKS, glue_metrics, read_glue
from hf_dynsparse.data.files import DataError, check_file, ending_of, read_file, reading
from hf_dynsparse.data.glue import glue_files
from hf_dynsparse.data.rows import check_not_blank, check_splits, check_text, label_names, label_reader
from hf_dynsparse.data.tokenizer_checks import check_fit, check_special_tokens, check_tokenizer
from hf_dynsparse.files import write_atomically
from hf_dynsparse.models.auto import load_pretrained, load_teacher
from hf_dynsparse.reports.facts import describe_data, describe_start
from hf_dynsparse.reports.pictures.runs import plot_training
from hf_dynsparse.training.finetuning import (
    FinetuningArguments,
    finish_quantization_,
    load_metric,
    prepare_finetuning_,
    set_final_sparsity_,
)
from hf_dynsparse.training.scripts import (
    ScriptArguments,
    check_model_to_resume,
    check_run_length,
    check_updates_to_resume,
    find_checkpoint,
    holds_output_dir,
    parse_arguments,
    preparing,
    settle_process,
    stop,
)
from hf_dynsparse.training.summary import summarize_finetuning


logger = logging.getLogger("run_glue_dynsparse")

FILE_ENDINGS = ("csv", "tsv", "json", "jsonl", "parquet")


@dataclass
class ModelArguments:
    """What is fine-tuned."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "A sparse checkpoint, or any dense encoder: folder or Hub name. Required."}
    )
    sparsity: float | None = field(
        default=None,
        metadata={
            "help": "Make a dense checkpoint sparse: leave out this share, keep the blocks of largest L1 norm. With "
            "--finetune_mode gradual step by step, while it trains."
        },
    )
    block_size: str | None = field(
        default=None, metadata={"help": "With --sparsity: side of a block, or ROWSxCOLUMNS such as 1x4. Default: 16."}
    )
    config_name: str | None = field(default=None, metadata={"help": "Configuration, if not the model's own."})
    tokenizer_name: str | None = field(default=None, metadata={"help": "Tokenizer, if not the model's own."})
    cache_dir: str | None = field(default=None, metadata={"help": "Where downloads and prepared data are kept."})
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit on the Hub."})
    token: str | None = field(default=None, metadata={"help": "Hub token for private models and data."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code from the model's repository."})
    ignore_mismatched_sizes: bool = field(
        default=False, metadata={"help": "Start with a new head where the checkpoint's has another number of labels."}
    )
    license: str | None = field(
        default=None, metadata={"help": "Licence of the trained model, for its card, e.g. apache-2.0."}
    )


@dataclass
class DataArguments:
    """What it is fine-tuned on."""

    task_name: str | None = field(default=None, metadata={"help": f"GLUE task: {', '.join(GLUE_TASKS)}."})
    glue_dir: str | None = field(
        default=None, metadata={"help": "Folder with the official files: CoLA/train.tsv, SST-2/train.tsv, ..."}
    )
    dataset_name: str | None = field(
        default=None, metadata={"help": "Data set on the Hub or in a folder. Default with --task_name: nyu-mll/glue."}
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of that data set."})
    train_file: str | None = field(
        default=None,
        metadata={"help": "Local .csv, .tsv, .json, .jsonl or .parquet, plain or .gz, with a column `label`."},
    )
    validation_file: str | None = field(default=None, metadata={"help": "The same for evaluation."})
    test_file: str | None = field(default=None, metadata={"help": "The same for prediction; labels not needed."})
    metric_path: str | None = field(
        default=None, metadata={"help": "Folder with the script of `evaluate`'s metric, to do without the Hub."}
    )
    max_seq_length: int = field(default=128, metadata={"help": "Tokens per example; longer ones are cut."})
    pad_to_max_length: bool = field(
        default=False, metadata={"help": "Pad to --max_seq_length instead of the longest of a batch."}
    )
    overwrite_cache: bool = field(default=False, metadata={"help": "Prepare the data again."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Use only so many examples for training."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use only so many for evaluation."})
    max_predict_samples: int | None = field(default=None, metadata={"help": "Use only so many for prediction."})
    language: str | None = field(
        default=None, metadata={"help": "Language of the texts, for the card; that of --task_name is en."}
    )


@dataclass
class RunArguments(ScriptArguments, FinetuningArguments):
    """How it is fine-tuned: all arguments of the transformers Trainer; rates and epochs follow --finetune_mode."""

    output_dir: str = field(default="dynsparse-glue", metadata={"help": "Where everything of the run is written."})
    do_train: bool = field(default=True, metadata={"help": "Train; --do_train false only evaluates or predicts."})
    do_eval: bool = field(default=True, metadata={"help": "Evaluate on the validation set at the end."})
    per_device_train_batch_size: int = field(default=32, metadata={"help": "Examples per process and micro-batch."})
    per_device_eval_batch_size: int = field(default=64, metadata={"help": "The same for evaluation."})
    eval_strategy: str = field(default="epoch", metadata={"help": "When to evaluate: no, steps or epoch."})
    save_strategy: str = field(default="epoch", metadata={"help": "When to save a checkpoint: no, steps or epoch."})
    save_total_limit: int | None = field(default=1, metadata={"help": "Checkpoints kept."})
    logging_steps: float = field(default=0.02, metadata={"help": "Steps between log entries, or a share of the run."})


@holds_output_dir
def main() -> None:
    """Parse, check, prepare, train, evaluate, predict, report."""
    try:
        kinds = (ModelArguments, DataArguments, RunArguments)
        model_args, data_args, args = parse_arguments(*kinds, description=__doc__)
        check_arguments(model_args, data_args, args)
        block_size = None if model_args.block_size is None else parse_block_size(model_args.block_size)
        checkpoint = find_checkpoint(args, model_args.token)
        if checkpoint is not None:
            check_updates_to_resume(args, checkpoint)
    except (ValueError, OSError) as error:
        stop(error)
    settle_process(args, "run_glue_dynsparse")

    hub = {"revision": model_args.model_revision, "token": model_args.token, "cache_dir": model_args.cache_dir}
    with preparing(args):
        raw = load_examples(model_args, data_args)
        columns, labels = understand(raw, data_args, args)
        tokenizer = AutoTokenizer.from_pretrained(
            model_args.tokenizer_name or model_args.model_name_or_path,
            trust_remote_code=model_args.trust_remote_code,
            **hub,
        )
        config = AutoConfig.from_pretrained(model_args.config_name, **hub) if model_args.config_name else None
        head = head_of(labels)
        if config is not None:
            for name, value in head.items():
                setattr(config, name, value)
            head = {}
        model = load_pretrained(
            AutoModelForSequenceClassification,
            model_args.model_name_or_path,
            sparsity=model_args.sparsity,
            block_size=block_size,
            all_blocks=args.finetune_mode == "gradual",
            config=config,
            ignore_mismatched_sizes=model_args.ignore_mismatched_sizes,
            trust_remote_code=model_args.trust_remote_code,
            **head,
            **hub,
        )
        check_tokenizer_and_model(tokenizer, model.config, columns, data_args)
        teacher = None
        if args.teacher:
            teacher = load_teacher(AutoModelForSequenceClassification, args.teacher, **{**hub, "revision": "main"})
            check_fit(tokenizer, teacher.config, data_args.max_seq_length, "The teacher", len(columns) == 2)
        prepare_finetuning_(model, args)
        if checkpoint is not None:
            check_model_to_resume(model, checkpoint)
        with args.main_process_first(desc="tokenize"):
            examples = tokenize(raw, columns, labels, tokenizer, data_args)
        trainer = DynSparseTrainer(
            model,
            args,
            teacher=teacher,
            train_dataset=examples["train"] if args.do_train else None,
            eval_dataset=examples["validation"] if args.do_eval else None,
            compute_metrics=scorer(data_args, labels),
            data_collator=None if data_args.pad_to_max_length else DataCollatorWithPadding(tokenizer),
            processing_class=tokenizer,
        )
        check_run_length(trainer)
    if args.do_train:
        logger.info("%d training examples; %s", len(examples["train"]), topology_summary(model))

    results: dict[str, float] = {}
    facts: dict[str, Any] = {}
    if args.do_train:
        outcome = trainer.train(resume_from_checkpoint=checkpoint)
        trainer.save_model()
        trainer.log_metrics("train", outcome.metrics)
        trainer.save_metrics("train", outcome.metrics)
        trainer.save_state()
        if args.quantization_aware:
            facts = finish_quantization_(trainer)
    if args.do_eval:
        results = evaluate(trainer, examples, data_args)
    if args.do_predict:
        predict(trainer, examples, labels, data_args)
    if args.do_train and trainer.is_world_process_zero():
        report(trainer, results, facts | about_run(model_args, data_args))
    if args.push_to_hub:
        trainer.push_to_hub()
    elif args.do_train:
        trainer.create_model_card()
    trainer.accelerator.end_training()


def check_arguments(model_args: ModelArguments, data_args: DataArguments, args: RunArguments) -> None:
    """Refuse what cannot work before anything is read or built."""
    if model_args.model_name_or_path is None:
        raise ValueError("`--model_name_or_path` must name a checkpoint, a folder or on the Hub. Got none.")
    if args.finetune_mode == "gradual":
        set_final_sparsity_(args, model_args.sparsity)
    if data_args.task_name is not None:
        data_args.task_name = data_args.task_name.lower().replace("-", "")
        if data_args.task_name not in GLUE_TASKS:
            raise ValueError(f"`--task_name` must be one of {', '.join(GLUE_TASKS)}. Got {data_args.task_name!r}.")
    if data_args.glue_dir is not None and data_args.task_name is None:
        raise ValueError("`--glue_dir` needs a `--task_name`. Got none.")
    if data_args.glue_dir is not None:
        glue_files(data_args.glue_dir, data_args.task_name)
    files = {"train": data_args.train_file, "validation": data_args.validation_file, "test": data_args.test_file}
    if not any((data_args.task_name, data_args.dataset_name, *files.values())):
        raise ValueError("Give the data: `--task_name`, `--dataset_name`, or `--train_file` and `--validation_file`.")
    for split, file in files.items():
        if file is not None:
            check_file(file, f"--{split}_file", FILE_ENDINGS)
    given = {split for split, file in files.items() if file}
    if given and len({ending_of(file) for file in files.values() if file}) > 1:
        raise ValueError(f"The files must have one format. Got {', '.join(file for file in files.values() if file)}.")
    wanted = {"train": args.do_train, "validation": args.do_eval, "test": args.do_predict}
    for split in [split for split in wanted if wanted[split] and given and split not in given]:
        flag = {"train": "train", "validation": "eval", "test": "predict"}[split]
        raise ValueError(f"`--do_{flag}` needs a `--{split}_file`. Got none. Give it, or `--do_{flag} false`.")
    if data_args.max_seq_length < 8:
        raise ValueError(f"`--max_seq_length` must be at least 8. Got {data_args.max_seq_length}.")


def load_examples(model_args: ModelArguments, data_args: DataArguments) -> DatasetDict:
    """The splits as they are: sentences and labels."""
    files = {"train": data_args.train_file, "validation": data_args.validation_file, "test": data_args.test_file}
    if any(files.values()):
        found = {split: read_file(file, split, model_args.cache_dir) for split, file in files.items() if file}
        return DatasetDict(found)
    if data_args.glue_dir is not None:
        raw = read_glue(data_args.glue_dir, data_args.task_name)
    else:
        name = data_args.dataset_name or "nyu-mll/glue"
        part = data_args.dataset_config_name or (data_args.task_name if data_args.dataset_name is None else None)
        with reading(name):
            raw = load_dataset(name, part, cache_dir=model_args.cache_dir, token=model_args.token)
    for part in ("validation", "test"):
        if part not in raw and f"{part}_matched" in raw:
            raw[part] = raw.pop(f"{part}_matched")
    return raw


def understand(raw: DatasetDict, data_args: DataArguments, args: RunArguments) -> tuple[list[str], list[str]]:
    """The one or two columns of text, and the names of the labels, none for regression; both known to be there."""
    wanted = {"train": args.do_train, "validation": args.do_eval, "test": args.do_predict}
    flags = {"train": "--do_train", "validation": "--do_eval", "test": "--do_predict"}
    check_splits(raw, {split: flags[split] for split in wanted if wanted[split]}, source_of("", data_args))
    labelled = {split: rows for split, rows in raw.items() if is_labelled(split)}
    for split, rows in labelled.items():
        if "label" not in rows.column_names:
            raise DataError(
                f"The data must have a column `label`. Got {', '.join(rows.column_names)} in "
                f"{source_of(split, data_args)}. Rename the column."
            )
    first = next(iter(raw.values()))
    task = GLUE_TASKS[data_args.task_name] if data_args.task_name is not None else None
    is_official = task is not None and set(task.sentences) <= set(first.column_names)
    columns = list(task.sentences) if is_official else text_columns(first, data_args)
    for split, rows in raw.items():
        missing = [name for name in columns if name not in rows.column_names]
        if missing:
            raise DataError(
                f"All data must have the columns {', '.join(columns)}. Got {', '.join(rows.column_names)} in "
                f"{source_of(split, data_args)}. Name them alike."
            )
        for column in columns:
            check_text(rows, column, source_of(split, data_args))
    if task is not None:
        return columns, list(task.labels)
    if not labelled:
        raise DataError("Labels must be known from a `--train_file` or `--validation_file`. Got none. Give one.")
    return columns, label_names(labelled, source_of("", data_args))


def is_labelled(split: str) -> bool:
    """Whether a split is trained on or evaluated, and so must have labels."""
    return split.split("_")[0] in ("train", "validation")


def source_of(split: str, data_args: DataArguments) -> str:
    """What the data of a split is called in an error."""
    file = getattr(data_args, f"{split}_file", None)
    name = file or data_args.dataset_name or data_args.glue_dir or data_args.task_name or "the files"
    return name if file or not split else f"{split} of {name}"


def text_columns(rows: Dataset, data_args: DataArguments) -> list[str]:
    """The one or two columns of text in data of one's own."""
    text = [name for name in rows.column_names if name not in ("label", "idx", "id")]
    named = [name for name in ("sentence1", "sentence2", "text") if name in text]
    strings = [name for name in text if getattr(rows.features[name], "dtype", "") in ("string", "large_string")]
    if {"sentence1", "sentence2"} <= set(named):
        return named[:2]
    columns = strings[:2] or named[:1]
    if not columns:
        raise DataError(
            f"The data must have a column of text. Got {', '.join(rows.column_names)} in {source_of('', data_args)}, "
            "none of strings. Write the text as strings."
        )
    return columns


def check_tokenizer_and_model(
    tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig, columns: list[str], data_args: DataArguments
) -> None:
    """Refuse a tokenizer that lacks a token, or makes sequences that the model does not take."""
    # Heads of BERT read the first token.
    check_tokenizer(tokenizer, ("cls", "sep", "pad") if isinstance(config, BertConfig) else ("pad",))
    check_special_tokens(tokenizer)
    check_fit(tokenizer, config, data_args.max_seq_length, pairs=len(columns) == 2)


def head_of(labels: list[str]) -> dict[str, Any]:
    """What a configuration says of a head for `labels`, or for a number if there are none."""
    names = labels or ["LABEL_0"]
    return {
        "num_labels": len(names),
        "problem_type": "single_label_classification" if labels else "regression",
        "id2label": dict(enumerate(names)),
        "label2id": {label: number for number, label in enumerate(names)},
    }


def tokenize(
    raw: DatasetDict,
    columns: list[str],
    labels: list[str],
    tokenizer: PreTrainedTokenizerBase,
    data_args: DataArguments,
) -> DatasetDict:
    """Token ids, and ids of `labels` (or numbers) where they are trained on or evaluated."""
    length = min(data_args.max_seq_length, tokenizer.model_max_length)
    if length < data_args.max_seq_length:
        logger.warning(
            "`--max_seq_length` %d is more than the tokenizer is for: %d.", data_args.max_seq_length, length
        )
    limits = {
        "train": data_args.max_train_samples,
        "validation": data_args.max_eval_samples,
        "test": data_args.max_predict_samples,
    }
    padding = "max_length" if data_args.pad_to_max_length else False
    prepared = {}
    for split, rows in raw.items():
        limit = limits.get(split.split("_")[0])
        if limit is not None:
            rows = rows.select(range(min(limit, len(rows))))
        source = source_of(split, data_args)
        read = label_reader(rows, labels, source) if is_labelled(split) else None

        def prepare(
            batch: dict[str, list[Any]], indices: list[int], read: Any = read, source: str = source
        ) -> dict[str, list[Any]]:
            text = [batch[name] for name in columns]
            check_not_blank(text, indices, source)
            prepared = dict(tokenizer(*text, max_length=length, truncation=True, padding=padding))
            if read is not None:
                # Not `label`: that column keeps the type that it had.
                prepared["labels"] = [read(*each) for each in zip(batch["label"], indices, strict=True)]
            return prepared

        prepared[split] = rows.map(
            prepare,
            batched=True,
            with_indices=True,
            remove_columns=rows.column_names,
            load_from_cache_file=not data_args.overwrite_cache,
            desc=f"tokenize {split}",
        )
    return DatasetDict(prepared)


def scorer(data_args: DataArguments, labels: list[str]) -> Callable[[EvalPrediction], dict[str, float]]:
    """Turns logits and labels into the task's metrics."""
    task = data_args.task_name
    if task is not None:
        metric = load_metric("glue", task, data_args.metric_path, fallback=lambda **given: glue_metrics(task, **given))

    def score(outcome: EvalPrediction) -> dict[str, float]:
        predictions = answers(outcome.predictions, labels)
        if task is not None:
            scores = metric(predictions=predictions, references=outcome.label_ids)
        elif labels:
            scores = {"accuracy": float((predictions == outcome.label_ids).mean())}
        else:
            scores = {"mse": float(((predictions - outcome.label_ids) ** 2).mean())}
        if len(scores) > 1:
            scores["combined_score"] = float(np.mean(list(scores.values())))
        return scores

    return score


def answers(predictions: Any, labels: list[str]) -> np.ndarray:
    """Class ids, or numbers, from the model's logits."""
    logits = predictions[0] if isinstance(predictions, tuple) else predictions
    return logits.argmax(-1) if labels else logits.squeeze(-1)


def evaluate(trainer: DynSparseTrainer, examples: DatasetDict, data_args: DataArguments) -> dict[str, float]:
    """The metrics of the validation sets, logged and saved."""
    results = trainer.evaluate()
    if data_args.task_name == "mnli" and "validation_mismatched" in examples:
        results |= trainer.evaluate(examples["validation_mismatched"], metric_key_prefix="eval_mm")
    trainer.log_metrics("eval", results)
    trainer.save_metrics("eval", results)
    return results


def predict(trainer: DynSparseTrainer, examples: DatasetDict, labels: list[str], data_args: DataArguments) -> None:
    """Write the predictions of every test set."""
    for split in [split for split in examples if split.startswith("test")]:
        name = f"{data_args.task_name or 'test'}{split.removeprefix('test')}"
        write_predictions(trainer, examples[split], labels, name)


def write_predictions(trainer: DynSparseTrainer, rows: datasets.Dataset, labels: list[str], name: str) -> None:
    """Write predict_results_<name>.txt: index and prediction, as the GLUE server takes them."""
    unlabelled = rows.remove_columns([name for name in rows.column_names if name == "labels"])
    found = answers(trainer.predict(unlabelled).predictions, labels)
    if trainer.is_world_process_zero():
        lines = [f"{i}\t{labels[int(x)] if labels else format(float(x), '.3f')}" for i, x in enumerate(found)]
        path = Path(str(trainer.args.output_dir)) / f"predict_results_{name}.txt"
        write_atomically(path, "\n".join(["index\tprediction", *lines]) + "\n")
        logger.info("%d predictions in %s", len(lines), path)


def report(trainer: DynSparseTrainer, results: dict[str, float], facts: dict[str, Any]) -> None:
    """Write summary.json and training.png, and say what was reached."""
    folder = Path(str(trainer.args.output_dir))
    summary = facts | summarize_finetuning(trainer, results)
    write_atomically(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
    try:
        plot_training(trainer.state.log_history, folder / "training.png", title=folder.name)
    except ImportError as error:
        logger.warning("No picture: %s", error)
    scores = ", ".join(f"{name} {value:.4f}" for name, value in summary["metrics"].items())
    print(f"\nResults in {folder}: {scores}; {summary['sparsity']:.1%} sparse")


def about_run(model_args: ModelArguments, data_args: DataArguments) -> dict[str, Any]:
    """What the card tells and the trainer does not know."""
    task, name, file = data_args.task_name, data_args.dataset_name, data_args.validation_file
    if task is not None and name is None:
        split = "validation_matched" if task == "mnli" else "validation"
        data = describe_data("nyu-mll/glue", config=task, split=split) | {"name": f"GLUE {task.upper()}"}
    else:
        data = describe_data(
            str(name or data_args.train_file),
            config=data_args.dataset_config_name,
            evaluated_on=file and Path(file).name,
        )
    return {
        "task": task or Path(data_args.train_file or str(name)).stem,
        **describe_start(model_args.model_name_or_path),
        "pattern": "the blocks of largest L1 norm" if model_args.sparsity else "that of the checkpoint",
        "data": data,
        "language": data_args.language or ("en" if task else None),
        "license": model_args.license,
    }


if __name__ == "__main__":
    main()
