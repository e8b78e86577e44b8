#!/usr/bin/env python
# /// script
# requires-python = ">=3.11"
# dependencies = ["hf_dynsparse[plots]"]
#
# [tool.uv.sources]
# hf_dynsparse = { path = ".." }
# ///
r"""
Fine-tune a sparse or dense encoder on extractive question answering: SQuAD, or questions of your own.

    # a sparse checkpoint, pattern fixed; files in the official layout of SQuAD
    accelerate launch examples/run_qa_dynsparse.py --model_name_or_path runs/medium-s90-b16 \
        --train_file train-v1.1.json --validation_file dev-v1.1.json --output_dir runs/squad
    # the same pattern made dense, or evolving
    accelerate launch examples/run_qa_dynsparse.py ... --finetune_mode dense
    # a fine-tuned model trained on with 8 bits, and saved as an int8 model (see docs/int8.md)
    accelerate launch examples/run_qa_dynsparse.py ... --quantization_aware --teacher runs/squad-dense
    # a dense BERT made sparse by what 512 windows need of it, learning from the dense one
    accelerate launch examples/run_qa_dynsparse.py --model_name_or_path bert-base-uncased --sparsity 0.8 \
        --dataset_name rajpurkar/squad --teacher runs/squad-dense --output_dir runs/squad-s80
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
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import (
    AutoConfig,
    AutoModelForQuestionAnswering,
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.hf_argparser import HfArg

from hf_dynsparse import Calibration, DynSparseTrainer, topology_summary
from hf_dynsparse.data.question_answering import SquadAnswers, longest_question
from hf_dynsparse.data.questions import QuestionArguments, answerer, load_questions, make_windows, only_inputs
from hf_dynsparse.data.squad import squad_metrics, squad_v2_metrics
from hf_dynsparse.data.tokenizer_checks import check_fit, check_positions, check_special_tokens, check_tokenizer
from hf_dynsparse.files import write_atomically
from hf_dynsparse.models.auto import load_pretrained, load_teacher
from hf_dynsparse.reports.facts import describe_data, describe_start
from hf_dynsparse.training import scripts
from hf_dynsparse.training.collapse import is_constant
from hf_dynsparse.training.finetuning import load_metric, prepare_finetuning_
from hf_dynsparse.training.flags import FinetunedModelArguments, FinetuningRunArguments


logger = logging.getLogger("run_qa_dynsparse")


@dataclass
class RunArguments(FinetuningRunArguments):
    """How it is fine-tuned: all arguments of the transformers Trainer; rates and epochs follow --finetune_mode."""

    output_dir: str = HfArg(default="dynsparse-qa", help="Where everything of the run is written.")
    per_device_train_batch_size: int = HfArg(default=16, help="Windows per process and micro-batch.")
    per_device_eval_batch_size: int = HfArg(default=32, help="The same for evaluation.")


ARGUMENTS = (FinetunedModelArguments, QuestionArguments, RunArguments)


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

        config = load_config(model_args, data_args)
        scripts.learn_from_itself(model_args, args, answers_questions(config))
        tokenizer = load_tokenizer(model_args, data_args, config)
        teacher = find_teacher(model_args, data_args, args, tokenizer)
        with args.main_process_first(desc="prepare the questions"):
            rows = load_questions(data_args, args.splits, cache_dir=model_args.cache_dir, token=model_args.token)
            windows = {split: make_windows(split, rows[split], tokenizer, data_args) for split in rows}
        calibration = scripts.calibration_of(model_args, args, windows.get("train"), tokenizer, checkpoint)
        model = load_model(model_args, args, config, calibration)
        prepare_finetuning_(model, args, will_train=args.do_train)
        if checkpoint is not None:
            scripts.check_model_to_resume(model, checkpoint)
        padding = {"padding": "max_length", "max_length": data_args.max_seq_length}
        trainer = DynSparseTrainer(
            model,
            args,
            teacher=teacher,
            train_dataset=windows.get("train"),
            eval_dataset=only_inputs(windows["validation"]) if args.do_eval else None,
            compute_metrics=scorer(rows, windows, data_args, args) if args.do_eval else None,
            data_collator=DataCollatorWithPadding(tokenizer, **(padding if data_args.pad_to_max_length else {})),
            processing_class=tokenizer,
        )
        scripts.check_run_length(trainer)

    facts, results = about_run(model_args, data_args), {}
    if args.do_train:
        counts = len(rows["train"]), len(windows["train"])
        logger.info("%d questions in %d windows", *counts)
        logger.debug("%s", topology_summary(model))
        facts |= scripts.finetune(trainer, checkpoint)
    if args.do_eval:
        results = trainer.evaluate()
        trainer.save_metrics("eval", results)
    if args.do_predict:
        answer = answerer(rows["test"], windows["test"], data_args)
        write_answers(answer(trainer.predict(only_inputs(windows["test"])).predictions), "predict", args)
    if args.do_train and trainer.is_world_process_zero():
        scripts.write_finetuning(trainer, results, facts)
    if args.push_to_hub:
        trainer.push_to_hub()
    elif args.do_train:
        trainer.create_model_card()
    trainer.accelerator.end_training()


def check(model_args: FinetunedModelArguments, data_args: QuestionArguments, args: RunArguments) -> None:
    """Refuse flags that cannot work, before anything is read or built."""
    scripts.check_finetuning(model_args, args)
    data_args.check(args.splits)


def load_config(model_args: FinetunedModelArguments, data_args: QuestionArguments) -> PretrainedConfig:
    """The configuration of a model that marks the start and the end of an answer."""
    name, trust = model_args.config_name or model_args.model_name_or_path, model_args.trust_remote_code
    config = AutoConfig.from_pretrained(name, trust_remote_code=trust, **model_args.hub)
    check_positions(config, data_args.max_seq_length)
    config.num_labels = 2
    return config


def answers_questions(config: PretrainedConfig) -> bool:
    """Whether the checkpoint of `config` has learned to."""
    return any(name.endswith("ForQuestionAnswering") for name in config.architectures or ())


def load_tokenizer(
    model_args: FinetunedModelArguments, data_args: QuestionArguments, config: PretrainedConfig
) -> PreTrainedTokenizerBase:
    """The model's own, unless another is named; refused if the model cannot take what comes out of it."""
    name, trust = model_args.tokenizer_name or model_args.model_name_or_path, model_args.trust_remote_code
    tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust, **model_args.hub)
    longest_question(tokenizer, data_args.max_seq_length, data_args.doc_stride)
    check_tokenizer(tokenizer, ("cls", "sep", "pad"))
    check_special_tokens(tokenizer)
    check_fit(tokenizer, config, data_args.max_seq_length, pairs=True)
    return tokenizer


def find_teacher(
    model_args: FinetunedModelArguments,
    data_args: QuestionArguments,
    args: RunArguments,
    tokenizer: PreTrainedTokenizerBase,
) -> PreTrainedModel | None:
    """The model of `--teacher`, if there is one."""
    if not args.teacher:
        return None
    teacher = load_teacher(AutoModelForQuestionAnswering, args.teacher, **model_args.hub_of_teacher(args.teacher))
    check_fit(tokenizer, teacher.config, data_args.max_seq_length, "The teacher", pairs=True)
    return teacher


def load_model(
    model_args: FinetunedModelArguments, args: RunArguments, config: PretrainedConfig, calibration: Calibration | None
) -> PreTrainedModel:
    """The model of `config`: sparse as it was saved, or dense and made sparse."""
    return load_pretrained(
        AutoModelForQuestionAnswering,
        all_blocks=args.finetune_mode == "gradual",
        config=config,
        calibration=calibration,
        **model_args.start,
    )


def scorer(
    rows: dict[str, Dataset], windows: dict[str, Dataset], data_args: QuestionArguments, args: RunArguments
) -> Callable[[EvalPrediction], dict[str, float]]:
    """Turns start and end logits of the validation set into scores, and writes down the answers."""
    answer = answerer(rows["validation"], windows["validation"], data_args)
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
        if is_constant([*answers.best.values()], [str(row["answers"]["text"]) for row in references]):
            scores["collapsed"] = 1.0
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


def about_run(model_args: FinetunedModelArguments, data_args: QuestionArguments) -> dict[str, Any]:
    """What the card tells and the trainer does not know."""
    name, file = str(data_args.dataset_name or data_args.train_file), data_args.validation_file
    return {
        "task": Path(name).stem,
        **describe_start(model_args.model_name_or_path),
        "pattern": model_args.kept if model_args.sparsity else "that of the checkpoint",
        "data": describe_data(name, config=data_args.dataset_config_name, evaluated_on=file and Path(file).name),
        "language": data_args.language,
        "license": model_args.license,
    }


if __name__ == "__main__":
    main()
