#!/usr/bin/env python
"""
Fine-tune a sparse or dense encoder on extractive question answering: SQuAD, or questions of your own.

    # a sparse checkpoint, pattern fixed; files in the official layout of SQuAD
    accelerate launch examples/run_qa_dynsparse.py --model_name_or_path runs/medium-s90-b16 \
        --train_file train-v1.1.json --validation_file dev-v1.1.json --output_dir runs/squad
    # the same pattern made dense, or evolving
    accelerate launch examples/run_qa_dynsparse.py ... --finetune_mode dense
    # a fine-tuned model trained on with 8 bits, and saved as an int8 model (see docs/int8.md)
    accelerate launch examples/run_qa_dynsparse.py ... --quantization_aware --teacher runs/squad-dense
    # a dense BERT made sparse by its largest blocks, learning from the dense one
    accelerate launch examples/run_qa_dynsparse.py --model_name_or_path bert-base-uncased --sparsity 0.8 \
        --block_size 4 --dataset_name rajpurkar/squad --teacher runs/squad-dense --output_dir runs/squad-s80-b4
    # some questions have no answer (SQuAD 2.0)
    accelerate launch examples/run_qa_dynsparse.py ... --dataset_name rajpurkar/squad_v2 --version_2_with_negative
    # no training: answer the questions of a file
    accelerate launch examples/run_qa_dynsparse.py --model_name_or_path runs/squad --do_train false --do_eval false \
        --do_predict --test_file questions.json --output_dir runs/answers

A context longer than --max_seq_length is read in windows that overlap by --doc_stride; the best span of all of them is
the answer. Scores are exact match and F1 of the words, in percent, the best over the answers to a question.

Writes into the output folder: model and tokenizer, README.md (a card), all_results.json, summary.json, training.png,
eval_predictions.json (id to answer) and eval_nbest_predictions.json; with --do_predict the same as predict_*.json; for
SQuAD 2.0 also *_null_odds.json, to choose --null_score_diff_threshold by.
"""

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, load_dataset
from transformers import (
    AutoConfig,
    AutoModelForQuestionAnswering,
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedTokenizerBase,
)

from hf_dynsparse import DynSparseTrainer, topology_summary
from hf_dynsparse.blocks.sizes import parse_block_size
from hf_dynsparse.data.files import DataError, check_file, ending_of, read_file, reading
from hf_dynsparse.data.question_answering import (
    SquadAnswers,
    longest_question,
    squad_answers,
    squad_evaluation_features,
    squad_training_features,
)
from hf_dynsparse.data.squad import check_squad_rows, read_squad_file, squad_metrics, squad_v2_metrics
from hf_dynsparse.data.tokenizer_checks import check_fit, check_positions, check_special_tokens, check_tokenizer
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


logger = logging.getLogger("run_qa_dynsparse")

FILE_ENDINGS = ("json", "jsonl", "parquet")


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
    license: str | None = field(
        default=None, metadata={"help": "Licence of the trained model, for its card, e.g. apache-2.0."}
    )


@dataclass
class DataArguments:
    """What it is fine-tuned on, and how questions are answered."""

    dataset_name: str | None = field(
        default=None,
        metadata={"help": "Data set on the Hub or in a folder: columns id, context, question and answers."},
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of that data set."})
    train_file: str | None = field(
        default=None,
        metadata={"help": "Local .json or .jsonl, plain or .gz: official layout or rows; or .parquet with rows."},
    )
    validation_file: str | None = field(default=None, metadata={"help": "The same for evaluation."})
    test_file: str | None = field(default=None, metadata={"help": "The same for prediction; answers not needed."})
    metric_path: str | None = field(
        default=None, metadata={"help": "Folder with the script of `evaluate`'s metric, to do without the Hub."}
    )
    max_seq_length: int = field(
        default=384, metadata={"help": "Tokens of a window: question, part of the context, special tokens."}
    )
    doc_stride: int = field(
        default=128, metadata={"help": "Tokens of context that two neighbouring windows share, less than a window."}
    )
    pad_to_max_length: bool = field(
        default=False, metadata={"help": "Pad to --max_seq_length instead of the longest of a batch."}
    )
    version_2_with_negative: bool = field(
        default=False, metadata={"help": "Questions may have no answer (SQuAD 2.0), and the model may give none."}
    )
    null_score_diff_threshold: float = field(
        default=0.0,
        metadata={"help": "With that: give none where its logits exceed those of the best answer by more than this."},
    )
    n_best_size: int = field(default=20, metadata={"help": "Answers to each question in the file of n best ones."})
    max_answer_length: int = field(default=30, metadata={"help": "Most tokens of an answer."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Use only so many questions for training."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use only so many for evaluation."})
    max_predict_samples: int | None = field(default=None, metadata={"help": "Use only so many for prediction."})
    preprocessing_num_workers: int | None = field(default=None, metadata={"help": "Processes that prepare the data."})
    overwrite_cache: bool = field(default=False, metadata={"help": "Prepare the data again."})
    language: str | None = field(default=None, metadata={"help": "Language of the texts, for the card, e.g. en."})


@dataclass
class RunArguments(ScriptArguments, FinetuningArguments):
    """How it is fine-tuned: all arguments of the transformers Trainer; rates and epochs follow --finetune_mode."""

    output_dir: str = field(default="dynsparse-qa", metadata={"help": "Where everything of the run is written."})
    do_train: bool = field(default=True, metadata={"help": "Train; --do_train false only evaluates or predicts."})
    do_eval: bool = field(default=True, metadata={"help": "Evaluate on the validation set at the end."})
    do_predict: bool = field(default=False, metadata={"help": "Answer the questions of the test set at the end."})
    per_device_train_batch_size: int = field(default=16, metadata={"help": "Windows per process and micro-batch."})
    per_device_eval_batch_size: int = field(default=32, metadata={"help": "The same for evaluation."})
    eval_strategy: str = field(default="epoch", metadata={"help": "When to evaluate: no, steps or epoch."})
    save_strategy: str = field(default="epoch", metadata={"help": "When to save a checkpoint: no, steps or epoch."})
    save_total_limit: int | None = field(default=1, metadata={"help": "Checkpoints kept."})
    logging_steps: float = field(default=0.02, metadata={"help": "Steps between log entries, or a share of the run."})

    def __post_init__(self) -> None:
        # transformers turns evaluation on for any strategy but "no".
        if not (self.do_train and self.do_eval):
            self.eval_strategy = "no"
        super().__post_init__()


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
    settle_process(args, "run_qa_dynsparse")

    hub = {"revision": model_args.model_revision, "token": model_args.token, "cache_dir": model_args.cache_dir}
    remote = hub | {"trust_remote_code": model_args.trust_remote_code}
    with preparing(args):
        config = AutoConfig.from_pretrained(model_args.config_name or model_args.model_name_or_path, **remote)
        check_positions(config, data_args.max_seq_length)
        config.num_labels = 2  # start and end
        name = model_args.tokenizer_name or model_args.model_name_or_path
        tokenizer = AutoTokenizer.from_pretrained(name, **remote)
        longest_question(tokenizer, data_args.max_seq_length, data_args.doc_stride)
        check_tokenizer(tokenizer, ("cls", "sep", "pad"))
        check_special_tokens(tokenizer)
        check_fit(tokenizer, config, data_args.max_seq_length, pairs=True)
        teacher = None
        if args.teacher:
            teacher = load_teacher(AutoModelForQuestionAnswering, args.teacher, **{**hub, "revision": "main"})
            check_fit(tokenizer, teacher.config, data_args.max_seq_length, "The teacher", pairs=True)
        with args.main_process_first(desc="prepare the questions"):
            rows = load_rows(model_args, data_args, args)
            features = {split: make_features(split, rows[split], tokenizer, data_args) for split in rows}
        model = load_pretrained(
            AutoModelForQuestionAnswering,
            model_args.model_name_or_path,
            sparsity=model_args.sparsity,
            block_size=block_size,
            all_blocks=args.finetune_mode == "gradual",
            config=config,
            **remote,
        )
        prepare_finetuning_(model, args)
        if checkpoint is not None:
            check_model_to_resume(model, checkpoint)
        padding = {"padding": "max_length", "max_length": data_args.max_seq_length}
        trainer = DynSparseTrainer(
            model,
            args,
            teacher=teacher,
            train_dataset=features.get("train"),
            eval_dataset=only_inputs(features["validation"]) if args.do_eval else None,
            compute_metrics=scorer(rows, features, data_args, args) if args.do_eval else None,
            data_collator=DataCollatorWithPadding(tokenizer, **(padding if data_args.pad_to_max_length else {})),
            processing_class=tokenizer,
        )
        check_run_length(trainer)

    results: dict[str, float] = {}
    facts: dict[str, Any] = {}
    if args.do_train:
        logger.info(
            "%d questions in %d windows; %s", len(rows["train"]), len(features["train"]), topology_summary(model)
        )
        outcome = trainer.train(resume_from_checkpoint=checkpoint)
        trainer.save_model()
        trainer.log_metrics("train", outcome.metrics)
        trainer.save_metrics("train", outcome.metrics)
        trainer.save_state()
        if args.quantization_aware:
            facts = finish_quantization_(trainer)
    if args.do_eval:
        results = trainer.evaluate()
        trainer.log_metrics("eval", results)
        trainer.save_metrics("eval", results)
    if args.do_predict:
        answer = answerer(rows["test"], features["test"], data_args)
        write_answers(answer(trainer.predict(only_inputs(features["test"])).predictions), "predict", args)
    if args.do_train and trainer.is_world_process_zero():
        report(trainer, results, facts | about_run(model_args, data_args))
    if args.push_to_hub:
        trainer.push_to_hub()
    elif args.do_train:
        trainer.create_model_card()
    trainer.accelerator.end_training()


def splits_needed(args: RunArguments) -> list[str]:
    """The splits that the run reads."""
    wanted = {"train": args.do_train, "validation": args.do_eval, "test": args.do_predict}
    return [split for split in wanted if wanted[split]]


def check_arguments(model_args: ModelArguments, data_args: DataArguments, args: RunArguments) -> None:
    """Refuse what cannot work before anything is read or built."""
    if model_args.model_name_or_path is None:
        raise ValueError("`--model_name_or_path` must name a checkpoint, a folder or on the Hub. Got none.")
    if args.finetune_mode == "gradual":
        set_final_sparsity_(args, model_args.sparsity)
    files = {"train": data_args.train_file, "validation": data_args.validation_file, "test": data_args.test_file}
    if data_args.dataset_name and any(files.values()):
        raise ValueError("Give --dataset_name or files, not both.")
    if not data_args.dataset_name and not any(files.values()):
        raise ValueError("Give the data: `--dataset_name`, or `--train_file` and `--validation_file`. Got none.")
    for split, file in files.items():
        if file is not None:
            check_file(file, f"--{split}_file", FILE_ENDINGS)
    if not splits_needed(args):
        raise ValueError("There must be something to do: `--do_train`, `--do_eval` or `--do_predict`. Got none.")
    for split in splits_needed(args):
        if not data_args.dataset_name and files[split] is None:
            flag = {"train": "train", "validation": "eval", "test": "predict"}[split]
            raise ValueError(f"`--do_{flag}` needs a `--{split}_file`. Got none. Give it, or `--do_{flag} false`.")
    for flag in ("n_best_size", "max_answer_length"):
        if getattr(data_args, flag) < 1:
            raise ValueError(f"`--{flag}` must be positive. Got {getattr(data_args, flag)}.")


def load_rows(model_args: ModelArguments, data_args: DataArguments, args: RunArguments) -> dict[str, Dataset]:
    """The splits that the run needs, checked: a row a question."""
    limits = {
        "train": data_args.max_train_samples,
        "validation": data_args.max_eval_samples,
        "test": data_args.max_predict_samples,
    }
    files = {"train": data_args.train_file, "validation": data_args.validation_file, "test": data_args.test_file}
    found = None
    if data_args.dataset_name:
        name, part = data_args.dataset_name, data_args.dataset_config_name
        with reading(name):
            found = load_dataset(name, part, cache_dir=model_args.cache_dir, token=model_args.token)
    rows = {}
    for split in splits_needed(args):
        if found is not None and split not in found:
            raise DataError(f"`--dataset_name` must have a split {split}. Got {', '.join(found)}.")
        chosen = read_questions(files[split], model_args.cache_dir) if found is None else found[split]
        if limits[split] is not None:
            chosen = chosen.select(range(min(limits[split], len(chosen))))
        check_squad_rows(
            chosen, split, needs_answers=split != "test", may_lack_answers=data_args.version_2_with_negative
        )
        rows[split] = chosen
    return rows


def read_questions(path: str, cache_dir: str | None) -> Dataset:
    """The rows of a local file, kept on disk until the file changes."""
    return read_file(path, "train", cache_dir) if ending_of(path) == "parquet" else read_squad_file(path, cache_dir)


def make_features(split: str, rows: Dataset, tokenizer: PreTrainedTokenizerBase, data_args: DataArguments) -> Dataset:
    """Windows of tokens; for evaluation and prediction with what is needed to find the answers again."""
    # Whatever answers a test set has, nothing is learned or told from them.
    columns = ["id", "context", "question", *(["answers"] if split != "test" else [])]
    return rows.select_columns(columns).map(
        squad_training_features if split == "train" else squad_evaluation_features,
        fn_kwargs={
            "tokenizer": tokenizer,
            "max_seq_length": data_args.max_seq_length,
            "doc_stride": data_args.doc_stride,
        },
        batched=True,
        remove_columns=columns,
        num_proc=data_args.preprocessing_num_workers,
        load_from_cache_file=not data_args.overwrite_cache,
        desc=f"tokenize {split}",
    )


def only_inputs(features: Dataset) -> Dataset:
    """The features without what the model does not take."""
    return features.remove_columns(["example_id", "offset_mapping"])


def answerer(rows: Dataset, features: Dataset, data_args: DataArguments) -> Callable[[Sequence[Any]], SquadAnswers]:
    """Turns start and end logits of all windows into answers."""
    questions, windows = (
        rows.select_columns(["id", "context"]),
        features.select_columns(["example_id", "offset_mapping"]),
    )

    def answer(logits: Sequence[np.ndarray]) -> SquadAnswers:
        return squad_answers(
            questions,
            windows,
            *logits[:2],
            n_best_size=data_args.n_best_size,
            max_answer_length=data_args.max_answer_length,
            null_threshold=data_args.null_score_diff_threshold if data_args.version_2_with_negative else None,
        )

    return answer


def scorer(
    rows: dict[str, Dataset], features: dict[str, Dataset], data_args: DataArguments, args: RunArguments
) -> Callable[[EvalPrediction], dict[str, float]]:
    """Turns start and end logits of the validation set into scores, and writes down the answers."""
    answer = answerer(rows["validation"], features["validation"], data_args)
    with_null = data_args.version_2_with_negative
    metric = load_metric(
        "squad_v2" if with_null else "squad",
        path=data_args.metric_path,
        fallback=squad_v2_metrics if with_null else squad_metrics,
    )
    references = list(rows["validation"].select_columns(["id", "answers"]))

    def score(outcome: EvalPrediction) -> dict[str, float]:
        answers = answer(outcome.predictions)
        write_answers(answers, "eval", args)
        doubt = {"no_answer_probability": 0.0} if with_null else {}
        predictions = [{"id": id, "prediction_text": text, **doubt} for id, text in answers.best.items()]
        scores = metric(predictions=predictions, references=references)
        # The best thresholds would be looked up in the answers of this very set, and need a probability.
        return {name: value for name, value in scores.items() if not name.startswith("best_")}

    return score


def write_answers(answers: SquadAnswers, prefix: str, args: RunArguments) -> None:
    """Write <prefix>_predictions.json and the files beside it."""
    if args.process_index != 0:
        return
    contents = {"predictions": answers.best, "nbest_predictions": answers.n_best, "null_odds": answers.null_odds}
    for name, content in contents.items():
        if content:
            path = Path(args.output_dir) / f"{prefix}_{name}.json"
            write_atomically(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    logger.info("%d answers in %s", len(answers.best), Path(args.output_dir) / f"{prefix}_predictions.json")


def report(trainer: DynSparseTrainer, results: dict[str, float], facts: dict[str, Any]) -> None:
    """Write summary.json and training.png, and say what was reached."""
    folder = Path(str(trainer.args.output_dir))
    summary = facts | summarize_finetuning(trainer, results)
    write_atomically(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
    try:
        plot_training(trainer.state.log_history, folder / "training.png", title=folder.name)
    except ImportError as error:
        logger.warning("No picture: %s", error)
    scores = ", ".join(f"{name} {value:.4g}" for name, value in summary["metrics"].items())
    print(f"\nResults in {folder}: {scores}; {summary['sparsity']:.1%} sparse")


def about_run(model_args: ModelArguments, data_args: DataArguments) -> dict[str, Any]:
    """What the card tells and the trainer does not know."""
    name, file = str(data_args.dataset_name or data_args.train_file), data_args.validation_file
    return {
        "task": Path(name).stem,
        **describe_start(model_args.model_name_or_path),
        "pattern": "the blocks of largest L1 norm" if model_args.sparsity else "that of the checkpoint",
        "data": describe_data(name, config=data_args.dataset_config_name, evaluated_on=file and Path(file).name),
        "language": data_args.language,
        "license": model_args.license,
    }


if __name__ == "__main__":
    main()
