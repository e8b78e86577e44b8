#!/usr/bin/env python
# /// script
# requires-python = ">=3.11"
# dependencies = ["hf_dynsparse[glue,plots]"]
#
# [tool.uv.sources]
# hf_dynsparse = { path = ".." }
# ///
r"""
Fine-tune a sparse or dense encoder on a GLUE task, or on sentences of your own.

    # a sparse checkpoint, pattern fixed; official GLUE files in glue_data/SST-2, glue_data/CoLA, ...
    accelerate launch examples/run_glue_dynsparse.py \
        --model_name_or_path runs/medium-s90-b16 --task_name sst2 --glue_dir glue_data --output_dir runs/sst2
    # the same pattern made dense, or evolving
    accelerate launch examples/run_glue_dynsparse.py ... --finetune_mode dense
    # a fine-tuned model trained on with 8 bits, and saved as an int8 model (see docs/int8.md)
    accelerate launch examples/run_glue_dynsparse.py ... --quantization_aware --teacher runs/sst2-dense
    # a dense model that has learned the task, made sparse by what 512 examples need; it learns from its dense self
    accelerate launch examples/run_glue_dynsparse.py --model_name_or_path runs/sst2-dense --sparsity 0.8 ...
    # your own sentences: one column of text, or two, and one of labels
    accelerate launch examples/run_glue_dynsparse.py --train_file train.csv --validation_file valid.csv \
        --text_column_names title,body --label_column_name stars ...
    # no training: predict the labels of a file that has none
    accelerate launch examples/run_glue_dynsparse.py --model_name_or_path runs/sst2 --do_train false --do_eval false \
        --do_predict --test_file new.csv --output_dir runs/predictions

Writes into the output folder: model and tokenizer, README.md (a card), all_results.json, summary.json, training.png,
and predictions of the test set with --do_predict.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    DataCollatorWithPadding,
    EvalPrediction,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.hf_argparser import HfArg

from hf_dynsparse import Calibration, DynSparseTrainer, topology_summary
from hf_dynsparse.data import glue_metrics
from hf_dynsparse.data.classification import (
    TRANSFER,
    SentenceArguments,
    find_columns,
    head_of,
    labels_of,
    load_sentences,
    tokenize_sentences,
)
from hf_dynsparse.data.tokenizer_checks import check_fit, check_special_tokens, check_tokenizer
from hf_dynsparse.data.transfer import with_transfer_set
from hf_dynsparse.files import write_atomically
from hf_dynsparse.models.auto import load_pretrained, load_teacher
from hf_dynsparse.reports.facts import describe_data, describe_start
from hf_dynsparse.training import scripts
from hf_dynsparse.training.collapse import is_constant
from hf_dynsparse.training.finetuning import center_head_, load_metric, prepare_finetuning_
from hf_dynsparse.training.flags import FinetunedModelArguments, FinetuningRunArguments


logger = logging.getLogger("run_glue_dynsparse")


@dataclass
class ModelArguments(FinetunedModelArguments):
    """What is fine-tuned."""

    ignore_mismatched_sizes: bool = HfArg(
        default=False, help="Start with a new head where the checkpoint's has another number of labels."
    )


@dataclass
class RunArguments(FinetuningRunArguments):
    """How it is fine-tuned: all arguments of the transformers Trainer; rates and epochs follow --finetune_mode."""

    output_dir: str = HfArg(default="dynsparse-glue", help="Where everything of the run is written.")


ARGUMENTS = (ModelArguments, SentenceArguments, RunArguments)


@scripts.holds_output_dir
def main() -> None:
    """Parse, check, prepare, train, evaluate, predict, report."""
    with scripts.one_line_errors():
        model_args, data_args, args = scripts.parse_arguments(*ARGUMENTS, description=__doc__)
        check(model_args, data_args, args)
        checkpoint = scripts.find_checkpoint(args, model_args.token)
        if checkpoint is not None:
            scripts.check_updates_to_resume(args, checkpoint)
        scripts.prepare_process(args, logger.name)

        raw = load_sentences(data_args, cache_dir=model_args.cache_dir, token=model_args.token)
        known = None if args.do_train else known_labels(model_args)
        columns, labels = find_columns(raw, data_args, args.splits, known)
        tokenizer, config = load_tokenizer(model_args), load_config(model_args, labels)
        check_tokenizer_and_model(tokenizer, config, columns, data_args)
        scripts.learn_from_itself(model_args, args, labels_of(load_config(model_args)) == labels)
        teacher = find_teacher(model_args, data_args, args, tokenizer, columns)
        with args.main_process_first(desc="tokenize"):
            examples = tokenize_sentences(raw, columns, labels, tokenizer, data_args)
        calibration = scripts.calibration_of(model_args, args, examples.get("train"), tokenizer, checkpoint)
        model = load_model(model_args, args, config, calibration)
        prepare_finetuning_(model, args, will_train=args.do_train)
        if args.do_train and not labels:
            center_head_(model, examples["train"]["labels"])
        if TRANSFER in examples:
            examples["train"] = with_transfer_set(examples["train"], examples[TRANSFER])
        if checkpoint is not None:
            scripts.check_model_to_resume(model, checkpoint)
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
        scripts.check_run_length(trainer)

    facts = about_run(model_args, data_args)
    if args.do_train:
        logger.info("%d training examples", len(examples["train"]))
        logger.debug("%s", topology_summary(model))
        facts |= scripts.finetune(trainer, checkpoint)
    results = evaluate(trainer, examples, data_args) if args.do_eval else {}
    if args.do_predict:
        predict(trainer, examples, labels, data_args)
    if args.do_train and trainer.is_world_process_zero():
        scripts.write_finetuning(trainer, results, facts)
    if args.push_to_hub:
        trainer.push_to_hub()
    elif args.do_train:
        trainer.create_model_card()
    trainer.accelerator.end_training()


def check(model_args: ModelArguments, data_args: SentenceArguments, args: RunArguments) -> None:
    """Refuse flags that cannot work, before anything is read or built."""
    scripts.check_finetuning(model_args, args)
    data_args.check(args.splits)
    if data_args.transfer_file is not None and not args.do_train:
        raise ValueError("`--transfer_file` holds text to train on. Got --do_train false. Leave one of them out.")


def known_labels(model_args: ModelArguments) -> list[str] | None:
    """Those of the model, if it has been fine-tuned: they go before what is found in data to evaluate or predict."""
    return labels_of(load_config(model_args))


def load_tokenizer(model_args: ModelArguments) -> PreTrainedTokenizerBase:
    """The model's own, unless another is named."""
    name = model_args.tokenizer_name or model_args.model_name_or_path
    return AutoTokenizer.from_pretrained(name, trust_remote_code=model_args.trust_remote_code, **model_args.hub)


def load_config(model_args: ModelArguments, labels: list[str] | None = None) -> PretrainedConfig:
    """The model's own configuration, or one with a head for `labels`."""
    name, trust = model_args.config_name or model_args.model_name_or_path, model_args.trust_remote_code
    head = {} if labels is None else head_of(labels)
    return AutoConfig.from_pretrained(name, trust_remote_code=trust, **head, **model_args.hub)


def load_model(
    model_args: ModelArguments, args: RunArguments, config: PretrainedConfig, calibration: Calibration | None
) -> PreTrainedModel:
    """The model of `config`: sparse as it was saved, or dense and made sparse."""
    return load_pretrained(
        AutoModelForSequenceClassification,
        all_blocks=args.finetune_mode == "gradual",
        config=config,
        calibration=calibration,
        ignore_mismatched_sizes=model_args.ignore_mismatched_sizes,
        **model_args.start,
    )


def check_tokenizer_and_model(
    tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig, columns: list[str], data_args: SentenceArguments
) -> None:
    """Refuse a tokenizer that lacks a token, or makes sequences that the model does not take."""
    # Heads of BERT read the first token.
    check_tokenizer(tokenizer, ("cls", "sep", "pad") if isinstance(config, BertConfig) else ("pad",))
    check_special_tokens(tokenizer)
    check_fit(tokenizer, config, data_args.max_seq_length, pairs=len(columns) == 2)


def find_teacher(
    model_args: ModelArguments,
    data_args: SentenceArguments,
    args: RunArguments,
    tokenizer: PreTrainedTokenizerBase,
    columns: list[str],
) -> PreTrainedModel | None:
    """The model of `--teacher`, if there is one."""
    if not args.teacher:
        if data_args.transfer_file is not None:
            raise ValueError(
                "`--transfer_file` holds text that a `--teacher` labels. Got no teacher. Give one, or leave it out."
            )
        return None
    teacher = load_teacher(AutoModelForSequenceClassification, args.teacher, **model_args.hub_of_teacher(args.teacher))
    check_fit(tokenizer, teacher.config, data_args.max_seq_length, "The teacher", len(columns) == 2)
    return teacher


def scorer(data_args: SentenceArguments, labels: list[str]) -> Callable[[EvalPrediction], dict[str, float]]:
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
        return scores | ({"collapsed": 1.0} if is_constant(predictions, outcome.label_ids) else {})

    return score


def answers(predictions: Any, labels: list[str]) -> np.ndarray:
    """Class ids, or numbers, from the model's logits."""
    logits = predictions[0] if isinstance(predictions, tuple) else predictions
    return logits.argmax(-1) if labels else logits.squeeze(-1)


def evaluate(trainer: DynSparseTrainer, examples: DatasetDict, data_args: SentenceArguments) -> dict[str, float]:
    """The metrics of the validation sets, saved."""
    results = trainer.evaluate()
    if data_args.task_name == "mnli" and "validation_mismatched" in examples:
        results |= trainer.evaluate(examples["validation_mismatched"], metric_key_prefix="eval_mm")
    trainer.save_metrics("eval", results)
    return results


def predict(trainer: DynSparseTrainer, examples: DatasetDict, labels: list[str], data_args: SentenceArguments) -> None:
    """Write the predictions of every test set."""
    for split in [split for split in examples if split.startswith("test")]:
        name = f"{data_args.task_name or 'test'}{split.removeprefix('test')}"
        write_predictions(trainer, examples[split], labels, name)


def write_predictions(trainer: DynSparseTrainer, rows: Dataset, labels: list[str], name: str) -> None:
    """Write predict_results_<name>.txt: index and prediction, as the GLUE server takes them."""
    unlabelled = rows.remove_columns([name for name in rows.column_names if name == "labels"])
    found = answers(trainer.predict(unlabelled).predictions, labels)
    if trainer.is_world_process_zero():
        lines = [f"{i}\t{labels[int(x)] if labels else format(float(x), '.3f')}" for i, x in enumerate(found)]
        path = Path(str(trainer.args.output_dir)) / f"predict_results_{name}.txt"
        write_atomically(path, "\n".join(["index\tprediction", *lines]) + "\n")
        logger.info("%d predictions in %s", len(lines), path)


def about_run(model_args: ModelArguments, data_args: SentenceArguments) -> dict[str, Any]:
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
        "pattern": model_args.kept if model_args.sparsity else "that of the checkpoint",
        "data": data,
        "language": data_args.language or ("en" if task else None),
        "license": model_args.license,
    }


if __name__ == "__main__":
    main()
