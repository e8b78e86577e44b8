#!/usr/bin/env python
# /// script
# requires-python = ">=3.11"
# dependencies = ["hf_dynsparse[plots]"]
#
# [tool.uv.sources]
# hf_dynsparse = { path = ".." }
# ///
r"""
Pre-train an always-sparse encoder by masked language modelling, with a topology that evolves (arXiv:2108.06277).

    accelerate launch examples/run_mlm_dynsparse.py                                   # built-in text, small model
    accelerate launch examples/run_mlm_dynsparse.py \
        --train_file train.txt.gz --validation_file valid.txt.gz \
        --preset medium --sparsity 0.9 --block_size 16 --max_steps 100000 --output_dir runs/medium-s90-b16
    accelerate launch examples/run_mlm_dynsparse.py --model_type modernbert --preset mini --block_size 4 ...
    accelerate launch examples/run_mlm_dynsparse.py ... --resume_from_checkpoint last # go on after an interruption
    accelerate launch examples/run_mlm_dynsparse.py examples/plans/eight_hours.yaml   # flags of a file, --time_budget
    accelerate launch examples/run_mlm_dynsparse.py ... --dense_baseline              # the dense twin
    accelerate launch examples/run_mlm_dynsparse.py ... --static                      # sparse, pattern fixed
    accelerate launch examples/run_mlm_dynsparse.py ... --teacher runs/dense          # learn from a dense model too
    accelerate launch examples/run_mlm_dynsparse.py ... --model_name_or_path runs/dense --method prune_ofa \
        --sparsity 0.9 --block_size 1 --learning_rate_rewinding                       # prune a dense model gradually

Writes into the output folder: the model and tokenizer (`from_pretrained` loads them), README.md (a card),
summary.json, training.png, block_map.png, topology_history/ (for `hf-dynsparse report`), and checkpoints from
which a run resumes bit for bit.
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from datasets import DatasetDict
from study.untrained import add_untrained_rest_
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    AutoModelForPreTraining,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.hf_argparser import HfArg

from hf_dynsparse import (
    Calibration,
    DynSparseBertConfig,
    DynSparseBertForMaskedLM,
    DynSparseBertForPreTraining,
    DynSparseTrainer,
    DynSparseTrainingArguments,
    TopologyHistory,
    sparse_from_config,
    sparse_layers,
    topology_summary,
)
from hf_dynsparse.blocks.distributions import DISTRIBUTIONS
from hf_dynsparse.blocks.sizes import parse_block_size
from hf_dynsparse.checkpoints.saved_run import SavedRun
from hf_dynsparse.data import count_pieces, train_wordpiece_tokenizer
from hf_dynsparse.data.files import DataError
from hf_dynsparse.data.pretraining import TextArguments, load_text, make_sequences
from hf_dynsparse.data.tokenizer_checks import check_fit, check_positions, check_tokenizer
from hf_dynsparse.models.auto import is_dense, load_teacher
from hf_dynsparse.models.presets import check_encoder, encoder_preset, overridden, tell_vocabulary_
from hf_dynsparse.models.pretraining import continued_config, first_pattern, preset_config
from hf_dynsparse.reports.facts import describe_data, describe_start
from hf_dynsparse.training import scripts
from hf_dynsparse.training.budget import check_budget, plan_steps, planned_steps
from hf_dynsparse.training.callbacks.log_file import LogFile
from hf_dynsparse.training.curriculum import Curriculum
from hf_dynsparse.training.finetuning import set_final_sparsity_
from hf_dynsparse.training.flags import PrunedModelArguments, ScriptArguments
from hf_dynsparse.training.interruption import saves_when_stopped
from hf_dynsparse.training.recipes import RECIPES, set_first_weights_, set_learning_rates_
from hf_dynsparse.training.summary import format_summary, summarize_run


logger = logging.getLogger("run_mlm_dynsparse")


@dataclass
class ModelArguments(PrunedModelArguments):
    """What is trained."""

    model_type: str = HfArg(
        default="dynsparse_bert",
        help="Architecture of the encoder: the BERT of this package, or one of transformers, such as modernbert, "
        "roberta, electra or distilbert.",
    )
    preset: str = HfArg(default="mini", help="Size of the encoder: tiny, mini, small, medium, base or large.")
    sparsity: float | None = HfArg(
        default=None,
        help="Share of inactive positions in every encoder matrix. Default: 0.9, or that of "
        "--model_name_or_path. A dense checkpoint is pruned to it: at once, or gradually if --method changes the "
        "density.",
    )
    block_size: str | None = HfArg(
        default=None,
        help="Side of a block, or ROWSxCOLUMNS such as 1x4. 1 is unstructured. Or sizes by patterns of layer "
        "names, such as *attention*=4,*=16. Default: 16, or that of --model_name_or_path.",
    )
    distribution: str = HfArg(default="uniform", help="Density over the layers.", metadata={"choices": DISTRIBUTIONS})
    dense_baseline: bool = HfArg(
        default=False, help="Train the dense twin instead: same head, data, optimiser and seed."
    )
    static: bool = HfArg(default=False, help="Keep the random pattern fixed: no topology updates.")
    untrained_rest: bool = HfArg(
        default=False,
        help="With --static, a probe: inactive weights keep their random initial values. They are not saved.",
    )
    model_name_or_path: str | None = HfArg(
        default=None, help="Go on from the weights of a BERT, dense or sparse: a folder or Hub name."
    )
    config_name: str | None = HfArg(
        default=None,
        help="Instead of a preset: the folder or Hub name of a configuration, of a dense encoder of any architecture, "
        "or of a dynsparse_bert with its sparsity and block size.",
    )
    config_overrides: str | None = HfArg(
        default=None, help="Changes to the configuration, e.g. num_hidden_layers=6,hidden_dropout_prob=0.1."
    )
    initializer_range: float | None = HfArg(
        default=None,
        help="Standard deviation of first weights. Default: by --recipe: 1 / sqrt(width) (small), 0.02 (paper).",
    )
    tokenizer_name: str | None = HfArg(
        default=None,
        help="Tokenizer folder or Hub name. Default: a WordPiece vocabulary is trained, on words of at "
        "most 100 letters: longer ones are [UNK].",
    )
    vocab_size: int = HfArg(default=8192, help="Size of the vocabulary when one is trained.")
    dtype: str | None = HfArg(
        default=None, help="Type of the weights when --model_name_or_path is loaded, e.g. bfloat16."
    )


@dataclass
class RunArguments(ScriptArguments, DynSparseTrainingArguments):
    """
    How it is trained: all arguments of the transformers Trainer, with defaults for a first run on a small machine.
    """

    recipe: str = HfArg(
        default="paper",
        help="What decides all that is not given: measurements with a few million tokens (small), or arXiv:2108.06277 "
        "(paper). Default: small; paper with --model_name_or_path.",
        metadata={"choices": list(RECIPES)},
    )
    output_dir: str = HfArg(default="dynsparse-mlm", help="Where everything of the run is written.")
    learning_rate: float | None = HfArg(
        default=None,
        help="Peak rate, used as given. Default: by --recipe: for matrices of a BERT 0.0004 over their density and "
        "0.004 for all else, of a ModernBERT 0.001 to 0.006 and 0.002, at width 256, falling with its root (small); "
        "the preset's dense optimum, times 6.40 at sparsity 0.9 (paper).",
    )
    max_steps: int | None = HfArg(
        default=None,
        help="Optimiser steps. Default: 2,000 (small), 500 (paper), or what --num_train_epochs makes; goes before.",
    )
    num_train_epochs: float | None = HfArg(default=None, help="Passes over the text, instead of --max_steps.")
    time_budget: str | None = HfArg(
        default=None,
        help="Time for training, instead of --max_steps: 8h, 90m, 300s, or minutes. A trial of some seconds tells how "
        "many steps that makes; a resumed run keeps them. The evaluation at the end comes on top.",
    )
    warmup_steps: float = HfArg(default=0.1, help="Steps of linear warm-up, or below 1 a share of the run.")
    per_device_train_batch_size: int = HfArg(default=32, help="Sequences per process and micro-batch.")
    per_device_eval_batch_size: int = HfArg(default=32, help="The same for evaluation.")
    eval_strategy: str = HfArg(default="steps", help="When to evaluate: no, steps or epoch.")
    eval_steps: float | None = HfArg(default=0.2, help="Steps between evaluations, or a share of the run.")
    save_steps: float = HfArg(default=0.2, help="Steps between checkpoints, or a share of the run.")
    save_total_limit: int | None = HfArg(default=2, help="Checkpoints kept.")
    logging_steps: float = HfArg(default=0.02, help="Steps between log entries, or a share of the run.")
    default_steps: ClassVar[int | None] = 500

    def __post_init__(self) -> None:
        if self.time_budget is not None:
            check_budget(self)
            self.max_steps = -1  # until the trial
        super().__post_init__()


@scripts.holds_output_dir
def main() -> None:
    """Parse, check, prepare, train, evaluate, report."""
    with scripts.one_line_errors():
        model_args, data_args, args = scripts.parse_arguments(*ARGUMENTS, description=__doc__, recipes=True)
        check(model_args, data_args, args)
        scripts.check_topology(args)
        checkpoint = scripts.find_checkpoint(args, model_args.token)
        if args.time_budget is not None and checkpoint is not None:
            args.max_steps = planned_steps(checkpoint)
        config = build_config(model_args, data_args, args, checkpoint)
        check_positions(config, data_args.max_seq_length)
        pattern = first_pattern(model_args.model_name_or_path, **model_args.hub)
        if model_args.calibration_samples:
            pattern = model_args.kept
        if checkpoint is not None:
            scripts.check_updates_to_resume(args, checkpoint)
        scripts.prepare_process(args, logger.name)

        with args.main_process_first(desc="prepare the text"):
            raw = load_text(data_args, cache_dir=model_args.cache_dir, token=model_args.token)
            tokenizer = load_tokenizer(model_args, raw, args, checkpoint)
            fit_vocabulary_(config, tokenizer, model_args, data_args)
            sequences = make_sequences(raw, tokenizer, data_args, args.seed)

        calibration = scripts.calibration_of(model_args, args, sequences["train"], tokenizer, checkpoint)
        model = load_model(model_args, data_args, config, calibration)
        if model_args.untrained_rest:
            add_untrained_rest_(model, config.initializer_range, args.seed)
        if sparse_layers(model):
            logger.debug("%s", topology_summary(model))
        else:
            logger.info("dense baseline: no sparse layers")
        if args.learning_rate is None:
            set_learning_rates_(args, model, model_args.preset)
        if checkpoint is not None:
            scripts.check_model_to_resume(model, checkpoint)
        parts = {
            "teacher": find_teacher(model_args, data_args, args),
            "piece_counts": count_pieces(sequences["train"], tokenizer, model.config.vocab_size),
            "data_collator": data_args.collator(tokenizer, args.seed),
            "train_dataset": sequences["train"],
            "eval_dataset": sequences["validation"],
            "processing_class": tokenizer,
        }
        if args.time_budget is not None and checkpoint is None:
            # Evaluations are a small share of the run, whatever its length, unless their rows are given.
            measured = parts if data_args.max_eval_samples is not None else parts | {"eval_dataset": None}
            args.max_steps = plan_steps(model, args, **measured)
        elif args.time_budget is not None:
            logger.info("%d steps, as planned when the run began", args.max_steps)
        trainer = DynSparseTrainer(model, args, **parts)
        scripts.check_run_length(trainer)
        scripts.tell_length(trainer)
        scripts.warn_of_plateau(trainer, data_args.max_seq_length)
        if data_args.max_eval_samples is None and args.eval_strategy != "no":
            trainer.eval_dataset = scripts.rows_while_training(trainer)

    if trainer.topology is not None:
        trainer.add_callback(TopologyHistory(trainer))
    trainer.add_callback(LogFile())
    with scripts.one_line_errors(DataError), saves_when_stopped(trainer):  # of a row that --streaming comes upon
        trainer.train(resume_from_checkpoint=checkpoint)
        trainer.eval_dataset = sequences["validation"]
    with scripts.one_line_errors(DataError):
        metrics = trainer.evaluate()
    trainer.save_model()
    trainer.save_state()
    if trainer.is_world_process_zero():
        about = about_run(model_args, data_args, str(raw["validation"].split)) | {"pattern": pattern}
        report(trainer, metrics, about, data_args.max_seq_length)
    if args.push_to_hub:
        trainer.push_to_hub()
    else:
        trainer.create_model_card()
    trainer.accelerator.end_training()


def check(model_args: ModelArguments, data_args: TextArguments, args: RunArguments) -> None:
    """Refuse flags that cannot work, before anything is read or built; no updates for a static or a dense model."""
    if model_args.static or model_args.dense_baseline:
        args.num_topology_updates, args.topology_update_every = 0, None
    if model_args.vocab_size < 64:
        raise ValueError(f"`--vocab_size` must leave room for letters: at least 64. Got {model_args.vocab_size}.")
    if model_args.untrained_rest and not model_args.static:
        raise ValueError("--untrained_rest fills a pattern that stays: give --static too.")
    if model_args.config_name and model_args.model_name_or_path:
        raise ValueError(
            "A run begins with the configuration of --config_name or the weights of --model_name_or_path. Got both: "
            "leave one out."
        )
    gradual = args.topology_settings().density_schedule != "constant"
    excluded = {"--dense_baseline": model_args.dense_baseline, "a --method that changes the density": gradual}
    excluded |= {"no --model_name_or_path": model_args.model_name_or_path is None}
    model_args.check_calibration(model_args.sparsity, excluded)
    check_first_weights(model_args)
    data_args.check(args.max_steps if args.time_budget is None else 1)
    Curriculum.of(args).check_text(data_args)


def check_first_weights(model_args: ModelArguments) -> None:
    """Refuse an `--initializer_range` that cannot be, or that nothing would use."""
    std = model_args.initializer_range
    if std is None:
        return
    if not 0 < std < 1:
        raise ValueError(f"`--initializer_range` must lie in (0, 1). Got {std}. BERT has 0.02.")
    if model_args.model_name_or_path or "initializer_range" in (model_args.config_overrides or ""):
        raise ValueError(
            "`--initializer_range` is for fresh weights, and given once. Got it with --model_name_or_path or in "
            "--config_overrides too. Leave it out there or here."
        )


def build_config(
    model_args: ModelArguments, data_args: TextArguments, args: RunArguments, checkpoint: str | None
) -> Any:
    """The model's configuration: of a preset, of `--config_name`, or that of a checkpoint to go on from."""
    source = model_args.config_name or model_args.model_name_or_path
    sparsity = 0.0 if model_args.dense_baseline and not source else model_args.sparsity
    block_size = None if model_args.block_size is None else parse_block_size(model_args.block_size)
    how = {"sparsity": sparsity, "block_size": block_size, "distribution": model_args.distribution}
    if not source and model_args.model_type == DynSparseBertConfig.model_type:
        config = preset_config(model_args.preset, overrides=model_args.config_overrides, **how)
        if args.final_sparsity is not None and not config.nnzb_per_layer():
            raise ValueError(
                f"`--final_sparsity` leads on from the blocks of a model. Got {args.final_sparsity} for a dense one. "
                "Give the sparsity of the end as --sparsity."
            )
    elif not source:
        config = encoder_preset(
            model_args.model_type, model_args.preset, block_size or 16, model_args.config_overrides
        )
    else:
        config = AutoConfig.from_pretrained(source, **model_args.hub)
        if model_args.config_name:
            check_encoder(config, source)
        config = overridden(config, model_args.config_overrides)
        if model_args.calibration_samples and not is_dense(config):
            if not model_args.calibrates_by_default:
                raise ValueError(
                    f"`--calibration_samples` is for dense checkpoints. Got {source}, which is sparse. Leave it out."
                )
            model_args.calibration_samples = 0
    if not source:
        asked = DynSparseBertConfig.sparsity if sparsity is None else sparsity
        set_first_weights_(config, args.recipe, model_args.config_overrides, asked)
    if model_args.model_name_or_path:
        gradual = args.topology_settings().density_schedule != "constant"
        name, keep_dense = model_args.model_name_or_path, model_args.dense_baseline
        config = continued_config(config, name, keep_dense=keep_dense, gradual=gradual, **how)
        if gradual and not model_args.dense_baseline:
            set_final_sparsity_(args, sparsity)
    elif not isinstance(config, DynSparseBertConfig):
        if data_args.nsp or model_args.untrained_rest:
            raise ValueError(
                f"--nsp and --untrained_rest need a dynsparse_bert. Got a {config.model_type}: leave them out."
            )
        with torch.device("meta"):  # whether the blocks fit
            fresh_encoder(model_args, config)
    if model_args.initializer_range is not None:
        config.initializer_range = model_args.initializer_range
    if checkpoint is not None and not model_args.model_name_or_path:
        SavedRun(checkpoint).check_config(config)
    return config


def load_model(
    model_args: ModelArguments, data_args: TextArguments, config: Any, calibration: Calibration | None
) -> PreTrainedModel:
    """The model of `config`: of a checkpoint if there is one, else fresh."""
    if not isinstance(config, DynSparseBertConfig):
        return fresh_encoder(model_args, config)
    architecture = DynSparseBertForPreTraining if data_args.nsp else DynSparseBertForMaskedLM
    if model_args.model_name_or_path:
        how = {"config": config, "dtype": model_args.dtype, "calibration": calibration}
        return architecture.from_pretrained(model_args.model_name_or_path, **how, **model_args.hub)
    return architecture(config)


def fresh_encoder(model_args: ModelArguments, config: PretrainedConfig) -> PreTrainedModel:
    """An encoder of transformers with random blocks, or dense, and a head for masked language modelling."""
    sparsity = 0.9 if model_args.sparsity is None else model_args.sparsity
    if model_args.dense_baseline or sparsity == 0:
        return AutoModelForMaskedLM.from_config(config)
    block_size = parse_block_size(model_args.block_size or "16")
    return sparse_from_config(AutoModelForMaskedLM, config, block_size, sparsity, distribution=model_args.distribution)


def load_tokenizer(
    model_args: ModelArguments, raw: DatasetDict, args: RunArguments, checkpoint: str | None
) -> PreTrainedTokenizerBase:
    """The named tokenizer, that of the run to resume, or a WordPiece vocabulary trained on the text."""
    source = model_args.tokenizer_name or model_args.model_name_or_path or checkpoint or args.teacher
    if source is None:
        source = str(Path(args.output_dir, scripts.TOKENIZER_FOLDER))
        if args.process_index == 0:
            logger.info("training a WordPiece vocabulary of %d entries", model_args.vocab_size)
            lines = (row["text"] for row in raw["train"])
            train_wordpiece_tokenizer(lines, vocab_size=model_args.vocab_size).save_pretrained(source)
    return AutoTokenizer.from_pretrained(source, trust_remote_code=model_args.trust_remote_code, **model_args.hub)


def fit_vocabulary_(
    config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    model_args: ModelArguments,
    data_args: TextArguments,
) -> None:
    """Give a fresh model the tokenizer's vocabulary; refuse one that cannot mask, or that a model cannot take."""
    check_tokenizer(tokenizer, ("cls", "sep", "mask", "pad"))
    if not model_args.model_name_or_path:
        tell_vocabulary_(config, tokenizer)
    check_fit(tokenizer, config, data_args.max_seq_length, pairs=data_args.nsp)


def find_teacher(model_args: ModelArguments, data_args: TextArguments, args: RunArguments) -> PreTrainedModel | None:
    """The model of `--teacher`, if there is one."""
    if not args.teacher:
        return None
    head = AutoModelForPreTraining if data_args.nsp else AutoModelForMaskedLM
    teacher = load_teacher(head, args.teacher, token=model_args.token)
    check_positions(teacher.config, data_args.max_seq_length, "The teacher")
    return teacher


def about_run(model_args: ModelArguments, data_args: TextArguments, split: str) -> dict[str, Any]:
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


def report(trainer: DynSparseTrainer, metrics: dict[str, float], about: dict[str, Any], seq_len: int) -> None:
    """Write summary.json and the pictures, and say what was reached."""
    summary = about | summarize_run(trainer, metrics, seq_len)
    scripts.write_results(trainer, summary, f"\n{format_summary(summary)}")


ARGUMENTS = (ModelArguments, TextArguments, RunArguments)


if __name__ == "__main__":
    main()
