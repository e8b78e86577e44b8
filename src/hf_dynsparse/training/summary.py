"""What a run reached, in numbers: the content of `summary.json`."""

import math
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import accelerate
import torch
import transformers

from .._transformers import has_length
from ..models.density import block_size_of
from ..models.flops import dense_flops_per_sequence
from ..models.heads import stack_name
from ..reports.facts import PLATEAU, checkpoint_bytes, counted, dense_bytes, describe_hardware, task_metrics
from ..reports.layers import model_facts
from .context_gain import plateau_left


if TYPE_CHECKING:  # the trainer imports the model card, which imports this
    from .trainer import DynSparseTrainer


# Training arguments that say how the weights came about; those of the topology are kept with the trainer's state.
RECORDED = (
    *("learning_rate", "lr_scheduler_type", "warmup_steps", "per_device_train_batch_size"),
    *("gradient_accumulation_steps", "optim", "adam_beta1", "adam_beta2", "adam_epsilon", "weight_decay"),
    *("max_grad_norm", "label_smoothing_factor", "bf16", "fp16", "dense_learning_rate", "block_age_adam"),
    *("learning_rate_rewinding", "recipe", "distance_bias", "seq_length_schedule", "mlm_probability_schedule"),
)
DISTILLATION = ("distillation_weight", "distillation_temperature", "distillation_positions")
LAYERS = ("distillation_layers", "distillation_layers_weight")
RELATIONS = ("distillation_relations", "distillation_relations_weight", "distillation_relation_heads")


def summarize_run(trainer: "DynSparseTrainer", metrics: dict[str, float], seq_len: int) -> dict[str, Any]:
    """
    Numbers of a finished run whose model stands in `trainer.args.output_dir`.

    Args:
        metrics (`dict[str, float]`): of the last evaluation.
        seq_len (`int`): tokens per training sequence, for the dense twin's FLOPs.
    """
    model, folder = trainer.accelerator.unwrap_model(trainer.model), Path(str(trainer.args.output_dir))
    size, encoder = model_facts(model), stack_name(model)
    topology = trainer.topology.metrics if trainer.topology else {}
    shares = trainer.curriculum.shares(trainer.state.global_step, trainer.state.max_steps, seq_len)
    return {
        "eval_loss": metrics["eval_loss"],
        "perplexity": math.exp(min(metrics["eval_loss"], 700.0)),
        "context_gain": metrics.get("eval_context_gain"),
        **plateau_left(trainer.state.log_history),
        "dense_flops": sum(
            trainer.throughput.tokens * share / length * dense_flops_per_sequence(model, length)
            for length, share in shares.items()
        ),
        "sparsity": size.sparsity,
        "block_size": block_size_of(model),
        "coverage": topology.get("coverage", 1.0),
        "topology_updates": topology.get("topology_updates", 0),
        "checkpoint_bytes": checkpoint_bytes(folder),
        "dense_checkpoint_bytes": size.dense_bytes,
        "encoder_bytes": checkpoint_bytes(folder, encoder),
        "dense_encoder_bytes": dense_bytes(model, encoder),
        "seq_len": seq_len,
        **describe_training(trainer),
    }


def summarize_finetuning(trainer: "DynSparseTrainer", metrics: dict[str, float]) -> dict[str, Any]:
    """
    Numbers of a finished fine-tuning run.

    Args:
        metrics (`dict[str, float]`): of the last evaluation, with the prefix `eval_`.
    """
    args: Any = trainer.args
    model = trainer.accelerator.unwrap_model(trainer.model)
    topology = model_facts(model)
    return {
        "metrics": task_metrics(metrics),
        "collapsed": "eval_collapsed" in metrics,  # one answer for the whole evaluation set
        "mode": args.finetune_mode if topology.layers else "dense",
        "sparsity": topology.sparsity,
        "block_shapes": sorted({layer.block_shape for layer in topology.layers}),
        "topology_updates": trainer.topology.metrics.get("topology_updates", 0) if trainer.topology else 0,
        "distillation_weight": args.distillation_weight if args.teacher else 0.0,
        **describe_training(trainer),
    }


def describe_training(trainer: "DynSparseTrainer") -> dict[str, Any]:
    """How much a model was trained, with which arguments, on how many sequences, where."""
    args, state = trainer.args, trainer.state
    recorded = RECORDED + (DISTILLATION if args.teacher else ())
    recorded += LAYERS if args.teacher and args.distillation_layers else ()
    recorded += RELATIONS if args.teacher and args.distillation_relations else ()
    recorded += ("new_block_warmup",) if args.block_age_adam else ()
    given = {name: value for name, value in args.to_dict().items() if name in recorded}
    datasets = {"train_sequences": trainer.train_dataset, "eval_sequences": trainer.eval_dataset}
    return {
        "epochs": state.epoch if has_length(trainer.train_dataset) else None,  # of a stream it counts steps
        "steps": state.global_step,
        "flops": state.total_flos,
        "tokens": trainer.throughput.tokens,
        "seconds": trainer.throughput.seconds,
        "tokens_per_second": trainer.throughput.tokens_per_second,
        **{name: len(data) for name, data in datasets.items() if has_length(data) and not isinstance(data, dict)},
        "learning_rate": args.learning_rate,
        "arguments": {name: value for name, value in given.items() if value is not None and value is not False},
        "teacher": args.teacher and Path(args.teacher).name,
        **({} if args.final_sparsity is None else {"pattern": "every block of the checkpoint"}),
        "pruned_to": args.final_sparsity,
        "processes": args.world_size,
        "repo_id": trainer.hub_model_id,
        "seed": args.seed,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "accelerate": accelerate.__version__,
        },
        "hardware": describe_hardware(trainer.args.device),
    }


def format_summary(summary: dict[str, Any]) -> str:
    """The lines a person reads at the end of a run."""
    rows = {
        "evaluation loss": f"{summary['eval_loss']:.4f} (perplexity {summary['perplexity']:.2f})",
        **_gain_row(summary),
        "training FLOPs": f"{summary['flops']:.3e}, {summary['flops'] / summary['dense_flops']:.1%} of the dense twin",
        "throughput": f"{summary['tokens_per_second']:,.0f} tokens per second on {summary['hardware']}",
        "sparsity": f"{summary['sparsity']:.4f} after {counted(summary['topology_updates'], 'topology update')}",
        "DOF coverage": f"{summary['coverage']:.1%} of all positions were active at some time",
        "checkpoint": _ratio(summary["checkpoint_bytes"], summary["dense_checkpoint_bytes"]),
        "  its encoder": _ratio(summary["encoder_bytes"], summary["dense_encoder_bytes"]),
    }
    return "\n".join(f"  {name:<16} {text}" for name, text in rows.items())


def smaller(sizes: Mapping[str, float]) -> str:
    """How much smaller than dense the encoder in a file is, and the whole file, of which embeddings may be most."""
    ratios = {
        part: (sizes[f"{name}_bytes"] / 1e6, sizes[f"dense_{name}_bytes"] / sizes[f"{name}_bytes"])
        for part, name in {"encoder": "encoder", "whole file": "checkpoint"}.items()
    }
    return ", ".join(f"{part} {size:.2f} MB ({times:.1f} times smaller)" for part, (size, times) in ratios.items())


def _gain_row(summary: Mapping[str, Any]) -> dict[str, str]:
    gain, tokens = summary.get("context_gain"), summary.get("plateau_left_tokens")
    if gain is None:
        return {}
    left = "still on their plateau"
    if tokens is not None:
        left = f"{PLATEAU} reached after {tokens / 1e6:.3g} M tokens, {summary['plateau_left_seconds']:.3g} s"
    return {"context gain": f"{gain:.2f} nats over the frequencies of pieces; {left}"}


def _ratio(size: int, dense: int) -> str:
    return f"{size / 1e6:.2f} MB, {size / dense:.1%} of dense ({dense / 1e6:.2f} MB)"
