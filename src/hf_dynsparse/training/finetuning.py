"""Fine-tuning: what the topology does meanwhile, recipes for it, and loading models, teachers and metrics."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..compress.int8 import prepare_qat_, to_int8_
from ..compress.int8.qat import can_round_embeddings
from ..models.dropout import set_dropout_
from ..models.heads import stack_name
from ..models.sparsify import densify_
from ..nn.linear import sparse_layers
from ..optim.recipes import FINETUNE_MODES, QUANTIZATION_AWARE
from ..reports.facts import checkpoint_bytes, dense_bytes, task_metrics
from ..reports.layers import model_facts
from ..topology.settings import option
from .arguments import DynSparseTrainingArguments


if TYPE_CHECKING:  # the trainer imports the model card, which imports this
    from .trainer import DynSparseTrainer


logger = logging.getLogger(__name__)


def _recipes(field_name: str) -> str:
    return ", ".join(f"{getattr(recipe, field_name):g} {mode}" for mode, recipe in FINETUNE_MODES.items())


@dataclass
class FinetuningArguments(DynSparseTrainingArguments):
    """
    [`DynSparseTrainingArguments`] for a downstream task: recipes by mode, and topology updates only in `"dynamic"` and
    `"gradual"`, the latter by method `prune_ofa` if no other is given.

    Raises:
        ValueError: for an unknown mode, or topology updates asked for in a mode without them.
    """

    finetune_mode: str = field(
        default="locked",
        metadata={
            "help": "What the topology does: "
            + "; ".join(f"{mode}: {recipe.does}" for mode, recipe in FINETUNE_MODES.items())
            + ". A model without sparse layers always trains as 'dense'.",
            "choices": list(FINETUNE_MODES),
        },
    )
    learning_rate: float | None = field(  # type: ignore[assignment]  # until `prepare_finetuning_`
        default=None,
        metadata={
            "help": f"Peak rate. Default: the recipe of the mode ({_recipes('learning_rate')}; "
            f"{FINETUNE_MODES['locked'].taught_rate:g} locked with --distillation_layers)."
        },
    )
    num_train_epochs: float | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": f"Epochs. Default: the recipe of the mode ({_recipes('num_train_epochs')})."}
    )
    pruning_ratio: float = option(
        "Share of active blocks that the first update of --finetune_mode dynamic replaces. Default: 0.1, far less "
        "than in pre-training, for what is pruned here has been learned."
    )
    warmup_steps: float = field(
        default=0.06, metadata={"help": "Linear warm-up: a number of steps, or below 1 a share of the run."}
    )
    dropout: float | None = field(
        default=None,
        metadata={
            "help": "Probability of all dropout while it trains. Default: the checkpoint's, and 0 with "
            "--distillation_layers, whose targets have none: a quarter of a step on a CPU."
        },
    )
    quantization_aware: bool = field(
        default=False,
        metadata={
            "help": "Train on with weights and inputs rounded to 8 bits, from a model fine-tuned for this task, and "
            "save an int8 model at the end. Defaults are then a learning rate of "
            f"{QUANTIZATION_AWARE.learning_rate:g} and {QUANTIZATION_AWARE.num_train_epochs:g} epochs; give the "
            "--teacher of the fine-tuning again."
        },
    )
    quantize_embeddings: bool = field(
        default=None,  # type: ignore[assignment]  # as `quantization_aware` says, where they are not tied
        metadata={
            "help": "With --quantization_aware: word embeddings too, which else are most of the file. Default: true, "
            "unless an output layer shares them."
        },
    )

    def __post_init__(self) -> None:
        if self.finetune_mode not in FINETUNE_MODES:
            raise ValueError(
                f"`finetune_mode` must be one of {', '.join(FINETUNE_MODES)}. Got {self.finetune_mode!r}."
            )
        if self.quantization_aware and self.finetune_mode not in ("locked", "dense"):
            raise ValueError(
                f"`quantization_aware` training keeps the pattern. Got `finetune_mode` {self.finetune_mode}. "
                "Fine-tune the model first, then start from it with `finetune_mode` locked."
            )
        for schedule in ("seq_length_schedule", "mlm_probability_schedule"):
            if getattr(self, schedule) is not None:
                raise ValueError(
                    f"`{schedule}` is for pre-training on packed text. Got {getattr(self, schedule)!r}. Leave it out."
                )
        if self.quantize_embeddings and not self.quantization_aware:
            raise ValueError("`quantize_embeddings` needs `quantization_aware`. Got it alone. Give both or none.")
        if self.dropout is not None and not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"`dropout` must lie in [0, 1). Got {self.dropout}. Choose 0.1, or leave it out.")
        if self.finetune_mode == "gradual":
            self.method = "prune_ofa" if self.method == "dynsparse" else self.method
        elif self.topology_settings().density_schedule != "constant":
            raise ValueError(
                f"A density that changes needs `finetune_mode` gradual. Got {self.finetune_mode} with method "
                f"{self.method}. Change one of them."
            )
        elif "pruning_ratio" not in self.given_options:
            self.pruning_ratio = 0.1
        if self.finetune_mode not in ("dynamic", "gradual"):
            if self.num_topology_updates or self.topology_update_every or self.method not in ("dynsparse", "static"):
                raise ValueError(
                    f"Topology updates need `finetune_mode` dynamic. Got {self.finetune_mode} with method "
                    f"{self.method}. Change one of them."
                )
            self.num_topology_updates = 0
        super().__post_init__()


def prepare_finetuning_(
    model: PreTrainedModel, args: FinetuningArguments, *, will_train: bool = True
) -> PreTrainedModel:
    """
    Make `model` dense or quantisation-aware, in place, if `args` say so, and fill in the learning rate and epochs that
    the user left open. To be called before the optimiser is made: densified weights need fresh moments.

    Args:
        will_train (`bool`): say in the log how; else the model is only evaluated, or predicts.

    Raises:
        ValueError: if a model is to be pruned step by step that has no blocks, or to no sparsity.
    """
    was_sparse = bool(sparse_layers(model))
    if args.finetune_mode == "gradual" and (not was_sparse or args.final_sparsity is None):
        raise ValueError(
            "`finetune_mode` gradual prunes the blocks of a model to `final_sparsity`. Got "
            f"{'one with' if was_sparse else 'one without'} sparse layers and final_sparsity={args.final_sparsity}. "
            "Load it by `load_pretrained(..., all_blocks=True)`, and call `set_final_sparsity_`."
        )
    if was_sparse and args.finetune_mode == "dense":
        densify_(model)
    if args.quantization_aware:
        asked = args.quantize_embeddings
        model.config.quantize_embeddings = can_round_embeddings(model) if asked is None else asked
        prepare_qat_(model, model.config.quantize_embeddings)
    dropout = 0.0 if args.dropout is None and args.distillation_layers is not None else args.dropout
    if dropout is not None:
        set_dropout_(model, dropout)
    mode = args.finetune_mode if was_sparse else "dense"
    sparsity = model_facts(model).sparsity if sparse_layers(model) else 0.0
    recipe = QUANTIZATION_AWARE if args.quantization_aware else FINETUNE_MODES[mode]
    if args.learning_rate is None:
        taught_rate = None if args.distillation_layers is None else recipe.taught_rate
        args.learning_rate = recipe.learning_rate if taught_rate is None else taught_rate
    if args.num_train_epochs is None:
        args.num_train_epochs = recipe.num_train_epochs
    if not will_train:
        return model
    logger.info(
        "Fine-tuning a %s model, mode %s: %s. Learning rate %g, %s.",
        f"{sparsity:.1%} sparse" if sparsity else "dense",
        mode,
        recipe.does if was_sparse or args.quantization_aware else "there are no sparse layers",
        args.learning_rate,
        f"{args.max_steps} steps" if args.max_steps > 0 else f"{args.num_train_epochs:g} epochs",
    )
    return model


@torch.no_grad()
def center_head_(model: PreTrainedModel, labels: Sequence[float]) -> None:
    """
    Let a fresh head that predicts a number begin at the mean of the `labels`, in place. Begun at zero, the first steps
    of a high rate bring all predictions there by way of the encoder, whose outputs then hardly depend on their inputs.
    A head whose bias is not zero has been trained, and stays.
    """
    body = set(model.base_model.modules())
    heads = (module for module in model.modules() if isinstance(module, nn.Linear) and module not in body)
    for head in heads:
        if head.out_features == 1 and head.bias is not None and not head.bias.any():
            head.bias.fill_(sum(labels) / len(labels))


def finish_quantization_(trainer: "DynSparseTrainer") -> dict[str, Any]:
    """
    At the end of quantisation-aware training: evaluate the rounded model, turn it into an int8 model, in place, and
    save that in the output folder. What is evaluated from then on is the int8 model itself.

    Returns:
        `dict[str, Any]`: for the summary. `rounded_metrics`, which those of the int8 model must equal but for rounding
            of sums; `encoder_bytes` and `checkpoint_bytes`, of the encoder and of all tensors in the file; and what
            these are of the dense model in float32, `dense_encoder_bytes` and `dense_checkpoint_bytes`.
    """
    metrics = trainer.evaluate(metric_key_prefix="rounded") if trainer.eval_dataset is not None else {}
    model = to_int8_(trainer.accelerator.unwrap_model(trainer.model))
    vars(model.config).pop("quantize_embeddings", None)  # the layers say it themselves now
    trainer.save_model()
    facts: dict[str, Any] = {"rounded_metrics": task_metrics(metrics, "rounded_")}
    if trainer.is_world_process_zero():
        for what, part in {"encoder": stack_name(model), "checkpoint": ""}.items():
            facts[f"{what}_bytes"] = checkpoint_bytes(str(trainer.args.output_dir), part)
            facts[f"dense_{what}_bytes"] = dense_bytes(model, part)
    return facts


def set_final_sparsity_(args: DynSparseTrainingArguments, sparsity: float | None) -> None:
    """
    Let a run that was asked for `sparsity` lead to it, from a model that it gets with all its blocks.

    Raises:
        ValueError: if there is none, `args` want another, or they change no density.
    """
    if sparsity is None or args.final_sparsity not in (None, sparsity):
        raise ValueError(
            "A checkpoint that is pruned step by step needs one `sparsity`, that of the end. Got "
            f"sparsity={sparsity} and final_sparsity={args.final_sparsity}. Give `--sparsity` alone."
        )
    if args.num_topology_updates == 0:
        raise ValueError(
            f"A model is pruned in topology updates. Got sparsity={sparsity} for the end of a run without updates. "
            "Leave out what turns them off."
        )
    args.final_sparsity = sparsity
    args.topology_settings()  # refuses what excludes the new value


def load_metric(
    name: str,
    config_name: str | None = None,
    path: str | None = None,
    *,
    fallback: Callable[..., dict[str, float]],
) -> Callable[..., dict[str, float]]:
    """
    A metric `compute(predictions=..., references=...)` from `evaluate`, or `fallback` when its script cannot be had.

    Args:
        name, config_name (`str`): what the metric is called on the Hub, such as `"glue"` and `"sst2"`.
        path (`str`, *optional*): a folder with the metric's script, instead of the Hub; then there is no fallback.
        fallback (`Callable`): computes the same.

    Raises:
        OSError: if `path` is given and holds no metric.
    """
    import evaluate  # takes seconds

    if path is not None:
        return evaluate.load(path, config_name).compute
    try:
        return evaluate.load(name, config_name).compute
    except (OSError, ImportError) as error:
        logger.info(  # the fallback gives the same numbers
            "`evaluate` cannot load the metric %s (%s): the same is computed here.",
            "/".join(filter(None, (name, config_name))),
            type(error).__name__,
        )
        return fallback
