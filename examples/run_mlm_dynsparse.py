#!/usr/bin/env python
"""
Pre-train an always-sparse BERT by masked language modelling, with a topology that evolves (arXiv:2108.06277).

    accelerate launch examples/run_mlm_dynsparse.py                                   # built-in text, small model
    accelerate launch examples/run_mlm_dynsparse.py \
        --train_file train.txt.gz --validation_file valid.txt.gz \
        --preset medium --sparsity 0.9 --block_size 16 --max_steps 100000 --output_dir runs/medium-s90-b16
    accelerate launch examples/run_mlm_dynsparse.py ... --resume_from_checkpoint last # go on after an interruption
    accelerate launch examples/run_mlm_dynsparse.py ... --dense_baseline              # the dense twin
    accelerate launch examples/run_mlm_dynsparse.py ... --static                      # sparse, pattern fixed
    accelerate launch examples/run_mlm_dynsparse.py ... --teacher runs/dense          # learn from a dense model too
    accelerate launch examples/run_mlm_dynsparse.py ... --model_name_or_path runs/dense --method prune_ofa \
        --sparsity 0.9 --block_size 1 --learning_rate_rewinding                       # prune a dense model gradually

Writes into the output folder: the model and tokenizer (`from_pretrained` loads them), README.md (a card),
summary.json, training.png, block_map.png, topology_history/ (`hf-dynsparse animate` draws it), and checkpoints from
which a run resumes bit for bit.
"""

import json
import logging
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from datasets import Dataset, DatasetDict, load_dataset
from huggingface_hub.errors import StrictDataclassError
from study.untrained import add_untrained_rest_
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    AutoModelForPreTraining,
    AutoTokenizer,
    BertConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from hf_dynsparse import (
    DynSparseBertConfig,
    DynSparseBertForMaskedLM,
    DynSparseBertForPreTraining,
    DynSparseTrainer,
    DynSparseTrainingArguments,
    sparse_layers,
    sparse_learning_rate,
    topology_summary,
)
from hf_dynsparse.blocks.distributions import DISTRIBUTIONS
from hf_dynsparse.blocks.sizes import block_shapes_of, parse_block_size
from hf_dynsparse.checkpoints.saved_run import SavedRun
from hf_dynsparse.data import (
    DataCollatorForWholeWordMasking,
    build_next_sentence_pairs,
    embedded_corpus,
    split_line,
    split_sentences,
    train_wordpiece_tokenizer,
)
from hf_dynsparse.data.files import DataError, check_file, read_file, reading
from hf_dynsparse.data.rows import check_text, looks_numeric
from hf_dynsparse.data.tokenizer_checks import check_fit, check_positions, check_tokenizer, vocabulary_size
from hf_dynsparse.files import write_atomically
from hf_dynsparse.models.auto import every_block, load_teacher
from hf_dynsparse.reports.estimate import DENSE_LEARNING_RATES
from hf_dynsparse.reports.facts import describe_data, describe_start
from hf_dynsparse.reports.pictures.layers import plot_block_map
from hf_dynsparse.reports.pictures.runs import plot_training
from hf_dynsparse.topology.frames import read_history
from hf_dynsparse.training.callbacks.history import TopologyHistory
from hf_dynsparse.training.finetuning import set_final_sparsity_
from hf_dynsparse.training.rewinding import check_rewinding
from hf_dynsparse.training.scripts import (
    TOKENIZER_FOLDER,
    ScriptArguments,
    check_model_to_resume,
    check_run_length,
    check_updates_fit,
    check_updates_to_resume,
    find_checkpoint,
    holds_output_dir,
    parse_arguments,
    preparing,
    settle_process,
    stop,
)
from hf_dynsparse.training.summary import format_summary, summarize_run


logger = logging.getLogger("run_mlm_dynsparse")

# Tiny and large are not in the paper.
LEARNING_RATES = {"tiny": 1e-3, **DENSE_LEARNING_RATES, "large": 1e-4}


@dataclass
class ModelArguments:
    """What is trained."""

    preset: str = field(
        default="mini", metadata={"help": "Size of the BERT: tiny, mini, small, medium, base or large."}
    )
    sparsity: float | None = field(
        default=None,
        metadata={
            "help": "Share of inactive positions in every encoder matrix. Default: 0.9, or that of "
            "--model_name_or_path. A dense checkpoint is pruned to it: at once, or gradually if --method changes the "
            "density."
        },
    )
    block_size: str | None = field(
        default=None,
        metadata={
            "help": "Side of a block, or ROWSxCOLUMNS such as 1x4. 1 is unstructured. Or sizes by patterns of layer "
            "names, such as *attention*=4,*=16. Default: 16, or that of --model_name_or_path."
        },
    )
    distribution: str = field(
        default="uniform", metadata={"help": "Density over the layers.", "choices": DISTRIBUTIONS}
    )
    dense_baseline: bool = field(
        default=False, metadata={"help": "Train the dense twin instead: same head, data, optimiser and seed."}
    )
    static: bool = field(default=False, metadata={"help": "Keep the random pattern fixed: no topology updates."})
    untrained_rest: bool = field(
        default=False,
        metadata={
            "help": "With --static, a probe: inactive weights keep their random initial values. They are not saved."
        },
    )
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Go on from the weights of a BERT, dense or sparse: a folder or Hub name."}
    )
    config_name: str | None = field(
        default=None,
        metadata={"help": "A dynsparse_bert's folder or Hub name: instead of a preset, sparsity and block size."},
    )
    config_overrides: str | None = field(
        default=None, metadata={"help": "Changes to the preset, e.g. num_hidden_layers=6,hidden_dropout_prob=0.1."}
    )
    tokenizer_name: str | None = field(
        default=None,
        metadata={
            "help": "Tokenizer folder or Hub name. Default: a WordPiece vocabulary is trained, on words of at "
            "most 100 letters: longer ones are [UNK]."
        },
    )
    vocab_size: int = field(default=8192, metadata={"help": "Size of the vocabulary when one is trained."})
    cache_dir: str | None = field(default=None, metadata={"help": "Where downloads and prepared data are kept."})
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit on the Hub."})
    token: str | None = field(default=None, metadata={"help": "Hub token for private models and data."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code from the tokenizer's repository."})
    dtype: str | None = field(
        default=None, metadata={"help": "Type of the weights when --model_name_or_path is loaded, e.g. bfloat16."}
    )
    license: str | None = field(
        default=None, metadata={"help": "Licence of the trained model, for its card, e.g. apache-2.0."}
    )


@dataclass
class DataArguments:
    """What it is trained on."""

    dataset_name: str | None = field(default=None, metadata={"help": "Dataset on the Hub, or a local dataset folder."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of that dataset."})
    train_file: str | None = field(
        default=None, metadata={"help": "Local .txt, .csv, .tsv, .json, .jsonl or .parquet file, plain or .gz."}
    )
    validation_file: str | None = field(default=None, metadata={"help": "The same for evaluation."})
    validation_split_percentage: int = field(
        default=5, metadata={"help": "Share of the training text held out when there is no validation text."}
    )
    streaming: bool = field(
        default=False, metadata={"help": "Read while training, nothing on disk; needs --max_steps."}
    )
    max_seq_length: int = field(default=128, metadata={"help": "Tokens per sequence."})
    line_by_line: bool = field(default=False, metadata={"help": "One sequence a line instead of packed text."})
    pad_to_max_length: bool = field(default=False, metadata={"help": "Pad every sequence to --max_seq_length."})
    mlm_probability: float = field(default=0.15, metadata={"help": "Share of words to predict."})
    whole_word_mask: bool = field(default=True, metadata={"help": "Mask whole words rather than single WordPieces."})
    nsp: bool = field(default=False, metadata={"help": "Next sentence prediction beside masked language modelling."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Use only so many training sequences."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use only so many evaluation sequences."})
    preprocessing_num_workers: int | None = field(default=None, metadata={"help": "Processes that prepare the data."})
    overwrite_cache: bool = field(default=False, metadata={"help": "Prepare the data again."})
    language: str | None = field(default=None, metadata={"help": "Language of the text, for the card, e.g. en."})


@dataclass
class RunArguments(ScriptArguments, DynSparseTrainingArguments):
    """
    How it is trained: all arguments of the transformers Trainer, with defaults for a first run on a small machine.
    """

    output_dir: str = field(default="dynsparse-mlm", metadata={"help": "Where everything of the run is written."})
    learning_rate: float | None = field(
        default=None,
        metadata={
            "help": "Peak rate, used as given. Default: the preset's dense optimum, times 6.40 at sparsity 0.9."
        },
    )
    max_steps: int | None = field(
        default=None,
        metadata={"help": "Optimiser steps. Default: 500, or what --num_train_epochs makes; goes before these."},
    )
    num_train_epochs: float | None = field(
        default=None, metadata={"help": "Passes over the training text, instead of --max_steps."}
    )
    warmup_steps: float = field(
        default=0.1, metadata={"help": "Steps of linear warm-up, or below 1 a share of the run."}
    )
    per_device_train_batch_size: int = field(default=32, metadata={"help": "Sequences per process and micro-batch."})
    per_device_eval_batch_size: int = field(default=32, metadata={"help": "The same for evaluation."})
    eval_strategy: str = field(default="steps", metadata={"help": "When to evaluate: no, steps or epoch."})
    eval_steps: float | None = field(
        default=0.2, metadata={"help": "Steps between evaluations, or a share of the run."}
    )
    save_steps: float = field(default=0.2, metadata={"help": "Steps between checkpoints, or a share of the run."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints kept."})
    logging_steps: float = field(default=0.02, metadata={"help": "Steps between log entries, or a share of the run."})
    default_steps: ClassVar[int | None] = 500


@holds_output_dir
def main() -> None:
    """Parse, check, prepare, train, evaluate, report."""
    try:
        kinds = (ModelArguments, DataArguments, RunArguments)
        model_args, data_args, args = parse_arguments(*kinds, description=__doc__)
        settle_updates(model_args, args)
        checkpoint = find_checkpoint(args, model_args.token)
        check_data(model_args, data_args, args)
        config = build_config(model_args, args, checkpoint)
        check_positions(config, data_args.max_seq_length)
        pattern = first_pattern(model_args)
        check_topology(args, checkpoint)
    except (ValueError, OSError, StrictDataclassError) as error:
        stop(error)

    settle_process(args, "run_mlm_dynsparse")

    with preparing(args):
        with args.main_process_first(desc="prepare the text"):
            raw = load_text(model_args, data_args)
            tokenizer = load_tokenizer(model_args, raw, args, checkpoint)
            settle_vocabulary(config, tokenizer, model_args, data_args)
            sequences = prepare_sequences(raw, tokenizer, data_args, args)
        if not data_args.streaming:
            counts = len(sequences["train"]), len(sequences["validation"])
            logger.info("%d training and %d evaluation sequences", *counts)

        model = load_model(model_args, data_args, config)
        if model_args.untrained_rest:
            add_untrained_rest_(model, model.config.initializer_range, args.seed)
        logger.info("%s", topology_summary(model) if sparse_layers(model) else "dense baseline: no sparse layers")
        if args.learning_rate is None:
            args.learning_rate = sparse_learning_rate(LEARNING_RATES[model_args.preset], model.config.sparsity)
            logger.info("learning rate %.3g, by the rule for sparsity %g", args.learning_rate, model.config.sparsity)
        if checkpoint is not None:
            check_model_to_resume(model, checkpoint)
        trainer = DynSparseTrainer(
            model,
            args,
            teacher=find_teacher(model_args, data_args, args),
            data_collator=make_collator(tokenizer, data_args, args),
            train_dataset=sequences["train"],
            eval_dataset=sequences["validation"],
            processing_class=tokenizer,
        )
        check_run_length(trainer)
    if trainer.topology is not None:
        trainer.add_callback(TopologyHistory(trainer))
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
        metrics = trainer.evaluate()
    except DataError as error:  # of a row that --streaming came upon
        stop(error)
    trainer.save_model()
    trainer.save_state()
    if trainer.is_world_process_zero():
        about = about_run(model_args, data_args, str(raw["validation"].split)) | {"pattern": pattern}
        report(trainer, about | summarize_run(trainer, metrics, data_args.max_seq_length))
    if args.push_to_hub:
        trainer.push_to_hub()
    else:
        trainer.create_model_card()
    trainer.accelerator.end_training()


def load_model(
    model_args: ModelArguments, data_args: DataArguments, config: DynSparseBertConfig
) -> DynSparseBertForMaskedLM | DynSparseBertForPreTraining:
    """The model of `config`: of a checkpoint if there is one, else fresh."""
    architecture = DynSparseBertForPreTraining if data_args.nsp else DynSparseBertForMaskedLM
    if model_args.model_name_or_path:
        return architecture.from_pretrained(
            model_args.model_name_or_path,
            config=config,
            revision=model_args.model_revision,
            token=model_args.token,
            dtype=model_args.dtype,
        )
    return architecture(config)


def settle_vocabulary(
    config: DynSparseBertConfig,
    tokenizer: PreTrainedTokenizerBase,
    model_args: ModelArguments,
    data_args: DataArguments,
) -> None:
    """Give a fresh model the tokenizer's vocabulary; refuse one that cannot mask, or that a model cannot take."""
    check_tokenizer(tokenizer, ("cls", "sep", "mask", "pad"))
    if not model_args.model_name_or_path:
        config.vocab_size, config.pad_token_id = vocabulary_size(tokenizer), tokenizer.pad_token_id
    check_fit(tokenizer, config, data_args.max_seq_length, pairs=data_args.nsp)


def find_teacher(model_args: ModelArguments, data_args: DataArguments, args: RunArguments) -> PreTrainedModel | None:
    """The model of `--teacher`, if there is one."""
    if not args.teacher:
        return None
    head = AutoModelForPreTraining if data_args.nsp else AutoModelForMaskedLM
    teacher = load_teacher(head, args.teacher, token=model_args.token)
    check_positions(teacher.config, data_args.max_seq_length, "The teacher")
    return teacher


def make_collator(
    tokenizer: PreTrainedTokenizerBase, data_args: DataArguments, args: RunArguments
) -> DataCollatorForWholeWordMasking:
    """What makes batches, and masks them."""
    return DataCollatorForWholeWordMasking(
        tokenizer,
        mlm_probability=data_args.mlm_probability,
        whole_word_mask=data_args.whole_word_mask,
        seed=args.seed,
        pad_to_multiple_of=data_args.max_seq_length if data_args.pad_to_max_length else None,
    )


def settle_updates(model_args: ModelArguments, args: RunArguments) -> None:
    """No topology updates for a static model or the dense twin, whatever else is asked for."""
    if model_args.static or model_args.dense_baseline:
        args.num_topology_updates, args.topology_update_every = 0, None


def check_topology(args: RunArguments, checkpoint: str | None) -> None:
    """Refuse updates that do not fit the run, or that differ from those of the run to resume."""
    settings = args.topology_settings()
    if args.max_steps > 0 and (settings["num_updates"] is not None or settings["update_every"] is not None):
        check_updates_fit(args, args.max_steps)
    if args.learning_rate_rewinding:
        check_rewinding(settings)
    if checkpoint is not None:
        check_updates_to_resume(args, checkpoint)


def check_data(model_args: ModelArguments, data_args: DataArguments, args: RunArguments) -> None:
    """Refuse what cannot work before anything is read or built."""
    if model_args.vocab_size < 64:
        raise ValueError(f"`--vocab_size` must leave room for letters: at least 64. Got {model_args.vocab_size}.")
    if model_args.untrained_rest and not model_args.static:
        raise ValueError("--untrained_rest fills a pattern that stays: give --static too.")
    if not 1 <= data_args.validation_split_percentage <= 99:
        raise ValueError(
            f"`--validation_split_percentage` must lie in [1, 99]. Got {data_args.validation_split_percentage}."
        )
    if data_args.dataset_name and data_args.train_file:
        raise ValueError("Give --dataset_name or --train_file, not both.")
    if data_args.validation_file and not data_args.train_file:
        raise ValueError("--validation_file needs a --train_file beside it.")
    if data_args.nsp and (data_args.line_by_line or data_args.streaming):
        raise ValueError("--nsp builds pairs from whole documents: leave out --line_by_line and --streaming.")
    if data_args.streaming and args.max_steps <= 0:
        raise ValueError("--streaming has no known length: give --max_steps.")
    if not 8 <= data_args.max_seq_length <= 512:
        raise ValueError(f"`--max_seq_length` must lie in [8, 512]. Got {data_args.max_seq_length}.")
    if not 0.0 < data_args.mlm_probability < 1.0:
        raise ValueError(f"`--mlm_probability` must lie in (0, 1). Got {data_args.mlm_probability}.")
    for flag in ("train_file", "validation_file"):
        path = getattr(data_args, flag)
        if path is not None:
            check_file(path, f"--{flag}")


def build_config(model_args: ModelArguments, args: RunArguments, checkpoint: str | None) -> DynSparseBertConfig:
    """The model's configuration; on resume it must be that of the checkpoint."""
    source = model_args.config_name or model_args.model_name_or_path
    if source:
        config = AutoConfig.from_pretrained(source, revision=model_args.model_revision, token=model_args.token)
        if model_args.model_name_or_path:
            return config_to_go_on(model_args, args, config)
        if not isinstance(config, DynSparseBertConfig):
            raise ValueError(
                f"`--config_name` must name a configuration of dynsparse_bert. Got {source}, of {config.model_type}. "
                "Give its sizes as --preset and --config_overrides, or its weights as --model_name_or_path."
            )
        return config
    if model_args.preset not in LEARNING_RATES:
        raise ValueError(f"`--preset` must be one of {', '.join(LEARNING_RATES)}. Got {model_args.preset!r}.")
    config = DynSparseBertConfig.preset(
        model_args.preset,
        sparsity=0.0 if model_args.dense_baseline else 0.9 if model_args.sparsity is None else model_args.sparsity,
        block_size=16 if model_args.block_size is None else parse_block_size(model_args.block_size),
        distribution=model_args.distribution,
    )
    if model_args.config_overrides:
        config.update_from_string(model_args.config_overrides)
        config = DynSparseBertConfig.from_dict(config.to_dict())
    if args.final_sparsity is not None and not config.nnzb_per_layer():
        raise ValueError(
            f"`--final_sparsity` leads on from the blocks of a model. Got {args.final_sparsity} for a dense one. Give "
            "the sparsity of the end as --sparsity."
        )
    if checkpoint is not None:
        SavedRun(checkpoint).check_config(config)
    return config


def config_to_go_on(model_args: ModelArguments, args: RunArguments, config: BertConfig) -> DynSparseBertConfig:
    """That of a checkpoint, with the sparsity that it is given at once; one that it is to reach goes to `args`."""
    source, sparsity = model_args.model_name_or_path, model_args.sparsity
    if not isinstance(config, BertConfig):
        raise ValueError(f"`--model_name_or_path` must name a BERT. Got {source}, a {config.model_type}.")
    if not isinstance(config, DynSparseBertConfig):
        config = DynSparseBertConfig.from_stock(config, sparsity=0.0)
    block_size = None if model_args.block_size is None else parse_block_size(model_args.block_size)
    changes_density = args.topology_settings()["density_schedule"] != "constant"
    if config.nnzb_per_layer():
        same_blocks = block_size is None or block_shapes_of(config.block_shapes(), block_size) == config.block_shapes()
        if model_args.dense_baseline or not same_blocks:
            raise ValueError(
                f"A sparse checkpoint keeps its blocks. Got {source} of block size {config.block_size} with "
                f"{'--dense_baseline' if same_blocks else f'--block_size {model_args.block_size}'}. Leave that out."
            )
        if changes_density:
            set_final_sparsity_(args, sparsity)
        elif sparsity not in (None, config.sparsity):
            raise ValueError(
                f"A sparse checkpoint keeps its sparsity. Got --sparsity {sparsity} for {source} of "
                f"{config.sparsity}. Leave it out, or choose a --method that changes the density, such as prune_ofa."
            )
        return config
    if model_args.dense_baseline or (sparsity is None and block_size is None and not changes_density):
        return config
    if sparsity is None:
        raise ValueError(
            f"A dense checkpoint is pruned to a `--sparsity`. Got {source} with --method {args.method} and "
            f"--block_size {model_args.block_size}, and none. Give it, or --dense_baseline to train on as it is."
        )
    how = {"sparsity": sparsity, "block_size": 16 if block_size is None else block_size}
    if changes_density:
        set_final_sparsity_(args, sparsity)
        how = every_block(config, how["block_size"])
    return DynSparseBertConfig.from_stock(config, distribution=model_args.distribution, **how)


def first_pattern(model_args: ModelArguments) -> str:
    """Where the first topology comes from, for the card. A run that prunes gradually tells it itself."""
    source = model_args.model_name_or_path
    if source is None:
        return "uniformly random blocks"
    config = AutoConfig.from_pretrained(source, revision=model_args.model_revision, token=model_args.token)
    is_sparse = isinstance(config, DynSparseBertConfig) and config.nnzb_per_layer()
    return "that of the checkpoint" if is_sparse else "the blocks of largest L1 norm"


def load_text(model_args: ModelArguments, data_args: DataArguments) -> DatasetDict:
    """Splits "train" and "validation" with one column, "text": a line, or a whole document with line breaks."""
    source = data_args.dataset_name or data_args.train_file or "the built-in text"
    raw = read_text(model_args, data_args)
    if "train" not in raw:
        raise DataError(f"`--dataset_name` must have a split train. Got {source} with only {', '.join(raw)}.")
    with reading(source):
        first = list(islice(raw["train"], 32))
    if not first:
        raise DataError(f"There must be text to train on. Got {source} without a row. Give another.")
    text = "text" if "text" in first[0] else next(iter(first[0]))
    if text != "text" and all(looks_numeric(row[text]) for row in first):
        raise DataError(
            f"The text must be words. Got {first[0][text]!r} in column `{text}` of {source}, the first of "
            f"{', '.join(first[0])}. Give the column of text the name `text`."
        )
    for split in ("train", "validation"):
        if split in raw:
            name = data_args.dataset_name or getattr(data_args, f"{split}_file") or source
            raw[split] = as_text(raw[split], text, name)
    if "validation" not in raw:
        raw = hold_out(raw["train"], data_args, source)
    return DatasetDict({split: raw[split] for split in ("train", "validation")})


def read_text(model_args: ModelArguments, data_args: DataArguments) -> dict[str, Any]:
    """The splits of a data set, the files, or the built-in text."""
    options = {"cache_dir": model_args.cache_dir, "streaming": data_args.streaming}
    if data_args.dataset_name:
        with reading(data_args.dataset_name):
            name, part = data_args.dataset_name, data_args.dataset_config_name
            return dict(load_dataset(name, part, token=model_args.token, **options))
    files = {"train": data_args.train_file, "validation": data_args.validation_file}
    if data_args.train_file is None:
        corpus = embedded_corpus(model_args.cache_dir)
        files = {"train": str(corpus.train_file), "validation": str(corpus.validation_file)}
    return {split: read_file(file, split, **options) for split, file in files.items() if file}


def as_text(rows: Dataset, column: str, source: str) -> Dataset:
    """Rows with one column, "text", which is known to hold strings."""
    names = next(iter(rows), {})
    if column not in names:
        raise DataError(f"All splits must have the column `{column}`. Got {source} with {', '.join(names) or 'none'}.")
    rows = check_text(rows.select_columns([column]), column, source)
    return rows if column == "text" else rows.rename_column(column, "text")


def hold_out(rows: Dataset, data_args: DataArguments, source: str) -> dict[str, Dataset]:
    """The first rows for validation, the others for training; of a stream, whose length is not known, a number."""
    percent = data_args.validation_split_percentage
    if not data_args.streaming:
        cut = len(rows) * percent // 100
        return {"validation": rows.select(range(cut)), "train": rows.select(range(cut, len(rows)))}
    count = percent * 100
    rest = rows.skip(count)
    if next(iter(rest), None) is None:
        raise DataError(
            f"--streaming holds out the first {count} rows: 100 times --validation_split_percentage. Got {source}, "
            "which has no more. Give a --validation_file, or leave out --streaming."
        )
    return {"validation": rows.take(count), "train": rest}


def load_tokenizer(
    model_args: ModelArguments, raw: DatasetDict, args: RunArguments, checkpoint: str | None
) -> PreTrainedTokenizerBase:
    """The named tokenizer, that of the run to resume, or a WordPiece vocabulary trained on the text."""
    source = model_args.tokenizer_name or model_args.model_name_or_path or checkpoint or args.teacher
    if source is None:
        source = os.path.join(args.output_dir, TOKENIZER_FOLDER)
        if args.process_index == 0:
            logger.info("training a WordPiece vocabulary of %d entries", model_args.vocab_size)
            lines = (row["text"] for row in raw["train"])
            train_wordpiece_tokenizer(lines, vocab_size=model_args.vocab_size).save_pretrained(source)
    return AutoTokenizer.from_pretrained(
        source,
        revision=model_args.model_revision,
        token=model_args.token,
        trust_remote_code=model_args.trust_remote_code,
    )


def prepare_sequences(
    raw: DatasetDict, tokenizer: PreTrainedTokenizerBase, data_args: DataArguments, args: RunArguments
) -> dict[str, Dataset]:
    """Token sequences of at most `max_seq_length`: packed text, single lines, or sentence pairs."""
    limits = {"train": data_args.max_train_samples, "validation": data_args.max_eval_samples}
    options = (
        {}
        if data_args.streaming
        else {"num_proc": data_args.preprocessing_num_workers, "load_from_cache_file": not data_args.overwrite_cache}
    )
    begin, end = tokenizer.cls_token_id, tokenizer.sep_token_id
    room = data_args.max_seq_length - 2

    def tokenize(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        taken = 1 if data_args.line_by_line else None  # of a line
        lines = (line for text in batch["text"] for line in text.splitlines())
        pieces = [piece for line in lines for piece in islice(split_line(line), taken)]
        return {"input_ids": tokenizer(pieces, add_special_tokens=False, verbose=False)["input_ids"] if pieces else []}

    def pack(batch: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
        if data_args.line_by_line:
            chunks = [ids[:room] for ids in batch["input_ids"] if ids]
        else:
            flat = [token for ids in batch["input_ids"] for token in ids]
            chunks = [flat[start : start + room] for start in range(0, len(flat) - room + 1, room)]
        return {"input_ids": [[begin, *chunk, end] for chunk in chunks]}

    sequences = {}
    for split in ("train", "validation"):
        if data_args.nsp:
            rows = build_next_sentence_pairs(
                documents(raw[split], tokenizer), tokenizer, max_seq_length=data_args.max_seq_length, seed=args.seed
            )
            packed = Dataset.from_list(list(rows))
        else:
            tokens = raw[split].map(
                tokenize, batched=True, remove_columns=["text"], **options, **describe(options, f"tokenize {split}")
            )
            # Large batches: only the tail of each is dropped.
            packed = tokens.map(pack, batched=True, batch_size=8000, **options, **describe(options, f"pack {split}"))
        if limits[split] is not None:
            packed = (
                packed.take(limits[split])
                if data_args.streaming
                else packed.select(range(min(limits[split], len(packed))))
            )
        if next(iter(packed), None) is None:
            raise DataError(
                f"The {split} text must fill at least one sequence of {data_args.max_seq_length} tokens. Got none. "
                "Give more text, a smaller --max_seq_length or --line_by_line."
            )
        sequences[split] = packed
    if data_args.streaming:
        sequences["train"] = sequences["train"].shuffle(seed=args.seed, buffer_size=10_000)
    return sequences


def describe(options: dict[str, object], text: str) -> dict[str, str]:
    """A label for the progress bar; streams have none."""
    return {"desc": text} if options else {}


def documents(rows: Iterable[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> Iterator[list[list[int]]]:
    """Documents as lists of tokenized sentences: a row with line breaks is one; an empty row or a title ends one."""
    sentences: list[str] = []

    def tokenized() -> list[list[int]]:
        return tokenizer(sentences, add_special_tokens=False, verbose=False)["input_ids"]

    for row in rows:
        lines = [line for line in row["text"].splitlines() if line.strip()]
        title = len(lines) == 1 and lines[0].startswith("= ") and lines[0].rstrip().endswith(" =")
        if (title or len(lines) != 1) and sentences:
            yield tokenized()
            sentences = []
        if not title:
            long = (sentence for line in lines for sentence in split_sentences(line))
            sentences.extend(piece for sentence in long for piece in split_line(sentence))
    if sentences:
        yield tokenized()


def about_run(model_args: ModelArguments, data_args: DataArguments, split: str) -> dict[str, Any]:
    """What the card tells and the trainer does not know; `split` is that of the validation text."""
    name = data_args.dataset_name or data_args.train_file
    data = {"name": "embedded corpus of hf_dynsparse", "split": split}
    if name is not None:
        file = data_args.validation_file and Path(data_args.validation_file).name
        held_out = f"held out of {Path(name).name}" if split == "train" else None
        config = data_args.dataset_config_name
        data = describe_data(name, config=config, split=split, evaluated_on=file or held_out)
    return {
        **describe_start(model_args.model_name_or_path),
        "data": data,
        "language": data_args.language,
        "license": model_args.license,
    }


def report(trainer: DynSparseTrainer, summary: dict[str, Any]) -> None:
    """Write summary.json and the pictures, and say what was reached."""
    folder = Path(trainer.args.output_dir)
    write_atomically(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
    try:
        draw(trainer, folder)
    except (ImportError, ValueError) as error:
        logger.warning("No pictures: %s", error)
    print(f"\nResults in {folder}:\n{format_summary(summary)}")


def draw(trainer: DynSparseTrainer, folder: Path) -> None:
    """training.png, and block_map.png of the layer whose history was kept from the start."""
    plot_training(trainer.state.log_history, folder / "training.png", title=folder.name)
    frames = read_history(folder)
    if frames and frames[0].step == 0:
        maps = [frame.block_map for frame in frames]
        ever_active = np.logical_or.reduce(maps)
        plot_block_map(maps[0], ever_active, maps[-1], folder / "block_map.png", title=frames[0].layer)


if __name__ == "__main__":
    main()
