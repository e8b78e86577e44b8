#!/usr/bin/env python
# /// script
# requires-python = ">=3.11"
# dependencies = ["hf_dynsparse[glue,plots]"]
#
# [tool.uv.sources]
# hf_dynsparse = { path = ".." }
# ///
r"""
Make a sentence encoder sparse, and recover it: it learns the embeddings of its dense self, from plain sentences.

    # a sentence or short paragraph a line; calibrated pruning first, then distillation
    accelerate launch examples/run_embedding_dynsparse.py --model_name_or_path sentence-transformers/all-MiniLM-L6-v2 \
        --sparsity 0.8 --block_size 16 --train_file sentences.txt.gz --output_dir runs/minilm-s80-b16
    # its hidden states too; scored on the development set of STS-B
    accelerate launch examples/run_embedding_dynsparse.py ... --distillation_layers all --glue_dir glue_data
    # a pattern that evolves, or is found step by step
    accelerate launch examples/run_embedding_dynsparse.py ... --finetune_mode dynamic
    accelerate launch examples/run_embedding_dynsparse.py ... --finetune_mode gradual
    # a checkpoint that is sparse already goes on
    accelerate launch examples/run_embedding_dynsparse.py --model_name_or_path runs/minilm-s80-b16 \
        --teacher sentence-transformers/all-MiniLM-L6-v2 --train_file more.txt.gz --output_dir runs/more

Writes into the output folder: model and tokenizer, README.md (a card), all_results.json, summary.json, training.png,
and what sentence-transformers loads it by: modules.json and the rest of the checkpoint's, or mean pooling.

    import hf_dynsparse, sentence_transformers
    embeddings = sentence_transformers.SentenceTransformer("runs/minilm-s80-b16").encode(["A sentence."])
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import (
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    DataCollatorWithPadding,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.hf_argparser import HfArg

from hf_dynsparse import Calibration, topology_summary
from hf_dynsparse.checkpoints.sentence_encoder import find_pooling, sentence_files, write_sentence_files
from hf_dynsparse.data.embedding import EmbeddingTextArguments, load_pairs, load_plain_sentences
from hf_dynsparse.data.tokenizer_checks import check_fit, check_special_tokens, check_tokenizer
from hf_dynsparse.models.auto import is_dense, load_pretrained, load_teacher
from hf_dynsparse.models.pooling import POOLINGS
from hf_dynsparse.reports.facts import describe_data, describe_start, task_metrics
from hf_dynsparse.training import scripts
from hf_dynsparse.training.finetuning import prepare_finetuning_
from hf_dynsparse.training.flags import FinetunedModelArguments, FinetuningRunArguments
from hf_dynsparse.training.sentence_encoders import SentenceDistillation, SentenceTrainer


logger = logging.getLogger("run_embedding_dynsparse")


@dataclass
class ModelArguments(FinetunedModelArguments):
    """What is recovered."""

    pooling: str | None = HfArg(
        default=None,
        help=f"From hidden states to an embedding: {', '.join(POOLINGS)}. Default: as the checkpoint says, or mean.",
        metadata={"choices": list(POOLINGS)},
    )


@dataclass
class RunArguments(FinetuningRunArguments):
    """How it is recovered: all arguments of the transformers Trainer; the rate follows --finetune_mode."""

    output_dir: str = HfArg(default="dynsparse-embedding", help="Where everything of the run is written.")
    num_train_epochs: float | None = HfArg(default=None, help="Passes over the sentences. Default: 1.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_train_epochs is None:
            self.num_train_epochs = 1.0


ARGUMENTS = (ModelArguments, EmbeddingTextArguments, RunArguments)


@scripts.holds_output_dir
def main() -> None:
    """Parse, check, prepare, train, evaluate, report."""
    with scripts.one_line_errors():
        model_args, data_args, args = scripts.parse_arguments(*ARGUMENTS, description=__doc__)
        check(model_args, data_args, args)
        checkpoint = scripts.find_checkpoint(args, model_args.token)
        if checkpoint is not None:
            scripts.check_updates_to_resume(args, checkpoint)
        scripts.prepare_process(args, logger.name)

        config = load_config(model_args)
        tokenizer = load_tokenizer(model_args, config, data_args.max_seq_length)
        modules = sentence_files(model_args.model_name_or_path, **model_args.hub)
        pooling = choose_pooling(model_args.pooling, modules)
        teacher = find_teacher(model_args, args, config, tokenizer, data_args.max_seq_length)
        with args.main_process_first(desc="tokenize"):
            where = {"cache_dir": model_args.cache_dir, "token": model_args.token}
            sentences = load_plain_sentences(data_args, tokenizer, **where)
            pairs = load_pairs(data_args, tokenizer)
        calibration = scripts.calibration_of(model_args, args, sentences["train"], tokenizer, checkpoint)
        model = load_model(model_args, args, config, calibration)
        prepare_finetuning_(model, args)
        if checkpoint is not None:
            scripts.check_model_to_resume(model, checkpoint)
        layers = args.distillation_layers, args.distillation_layers_weight
        trainer = SentenceTrainer(
            model,
            args,
            teacher=SentenceDistillation(teacher, pooling, *layers, **args.relations, dtype=args.teacher_dtype),
            pairs=pairs,
            train_dataset=sentences["train"],
            eval_dataset=sentences["validation"],
            data_collator=DataCollatorWithPadding(tokenizer),
            processing_class=tokenizer,
        )
        scripts.check_run_length(trainer)

    facts, results = about_run(model_args, data_args), {}
    if args.do_train:
        logger.info("%d training sentences", len(sentences["train"]))
        logger.debug("%s", topology_summary(model))
        if args.do_eval and checkpoint is None:
            facts["metrics_at_start"] = task_metrics(trainer.evaluate())
        facts |= scripts.finetune(trainer, checkpoint)
    if args.do_eval:
        results = trainer.evaluate()
        trainer.save_metrics("eval", results)
    if args.do_train and trainer.is_world_process_zero():
        sizes = {"width": config.hidden_size, "max_seq_length": data_args.max_seq_length}
        write_sentence_files(Path(args.output_dir), modules, pooling=pooling, **sizes)
        scripts.write_finetuning(trainer, results, facts)
    if args.push_to_hub:
        trainer.push_to_hub()
    elif args.do_train:
        trainer.create_model_card()
    trainer.accelerator.end_training()


def check(model_args: ModelArguments, data_args: EmbeddingTextArguments, args: RunArguments) -> None:
    """Refuse flags that cannot work, before anything is read or built."""
    scripts.check_finetuning(model_args, args)
    data_args.check()
    if args.do_predict:
        raise ValueError("There is nothing to predict without labels. Got --do_predict. Leave it out.")


def load_config(model_args: ModelArguments) -> PretrainedConfig:
    """The configuration of the encoder."""
    name, trust = model_args.config_name or model_args.model_name_or_path, model_args.trust_remote_code
    return AutoConfig.from_pretrained(name, trust_remote_code=trust, **model_args.hub)


def load_tokenizer(model_args: ModelArguments, config: PretrainedConfig, length: int) -> PreTrainedTokenizerBase:
    """The model's own, unless another is named; refused if the model cannot take what comes out of it."""
    name, trust = model_args.tokenizer_name or model_args.model_name_or_path, model_args.trust_remote_code
    tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust, **model_args.hub)
    check_tokenizer(tokenizer, ("pad",))
    check_special_tokens(tokenizer)
    check_fit(tokenizer, config, length)
    return tokenizer


def choose_pooling(given: str | None, modules: Path | None) -> str:
    """That of the checkpoint, if it has sentence files."""
    own = None if modules is None else find_pooling(modules)
    pooling = own or given or "mean"
    if pooling not in POOLINGS or given not in (None, pooling):
        raise ValueError(
            f"`--pooling` is that of the checkpoint, one of {', '.join(POOLINGS)}. Got {given}, and {own} in that."
        )
    return pooling


def find_teacher(
    model_args: ModelArguments,
    args: RunArguments,
    config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
) -> PreTrainedModel:
    """The dense checkpoint itself, unless `--teacher` names another encoder."""
    if args.teacher is None and not is_dense(config):
        raise ValueError(
            f"A sparse checkpoint learns from a `--teacher`. Got {model_args.model_name_or_path} and none. Name the "
            "dense encoder that it comes from."
        )
    args.teacher, args.distillation_weight = args.teacher or model_args.model_name_or_path, 1.0
    teacher = load_teacher(AutoModel, args.teacher, unused="pooler", **model_args.hub_of_teacher(args.teacher))
    check_fit(tokenizer, teacher.config, length, "The teacher")
    return teacher


def load_model(
    model_args: ModelArguments, args: RunArguments, config: PretrainedConfig, calibration: Calibration | None
) -> PreTrainedModel:
    """The encoder: sparse as it was saved, or dense and made sparse. It learns without dropout what has none."""
    gradual = args.finetune_mode == "gradual"
    model = load_pretrained(AutoModel, all_blocks=gradual, config=config, calibration=calibration, **model_args.start)
    args.dropout = args.dropout or 0.0
    for name, parameter in model.named_parameters():
        if "pooler" in name:  # no embedding is made of it
            parameter.requires_grad_(False)
    return model


def about_run(model_args: ModelArguments, data_args: EmbeddingTextArguments) -> dict[str, Any]:
    """What the card tells and the trainer does not know."""
    name, file = str(data_args.dataset_name or data_args.train_file), data_args.validation_file
    evaluated_on = Path(file).name if file else f"sentences held out of {Path(name).name}"
    if data_args.glue_dir:
        evaluated_on += "; STS-B for spearman_cosine"
    return {
        "task": "sentence embeddings",
        **describe_start(model_args.model_name_or_path),
        "pattern": model_args.kept if model_args.sparsity else "that of the checkpoint",
        "pipeline_tag": "sentence-similarity",
        "tags": ["sentence-transformers", "feature-extraction"],
        "data": describe_data(name, config=data_args.dataset_config_name, evaluated_on=evaluated_on),
        "language": data_args.language,
        "license": model_args.license,
    }


if __name__ == "__main__":
    main()
