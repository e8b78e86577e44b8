"""Fine-tuning: what the topology does meanwhile, recipes for it, and loading models, teachers and metrics."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

from transformers import AutoConfig, BertConfig, PretrainedConfig, PreTrainedModel

from .arguments import DynSparseTrainingArguments
from .layout import BlockSize
from .models import DynSparseBertConfig
from .nn import sparse_layers, topology_summary
from .quantizer import DynSparseQuantizationConfig, densify_


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Recipe:
    """Defaults of one fine-tuning mode."""

    learning_rate: float
    num_train_epochs: float
    does: str


# Locked patterns want three to five times the learning rate of dense models, and more epochs: arXiv:2111.05754
# (appendix) and arXiv:2203.07259 (section 4) agree.
FINETUNE_MODES = {
    "locked": Recipe(2e-4, 8.0, "the pattern stays fixed, only active blocks train"),
    "dense": Recipe(5e-5, 3.0, "the model is made dense first: zeros become trainable weights"),
    "dynamic": Recipe(2e-4, 8.0, "the pattern keeps evolving by topology updates"),
}


def _recipes(field_name: str) -> str:
    return ", ".join(f"{getattr(recipe, field_name):g} {mode}" for mode, recipe in FINETUNE_MODES.items())


@dataclass
class FinetuningArguments(DynSparseTrainingArguments):
    """
    [`DynSparseTrainingArguments`] for a downstream task: recipes by mode, and topology updates only in `"dynamic"`.

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
        default=None, metadata={"help": f"Peak rate. Default: the recipe of the mode ({_recipes('learning_rate')})."}
    )
    num_train_epochs: float | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": f"Epochs. Default: the recipe of the mode ({_recipes('num_train_epochs')})."}
    )
    pruning_ratio: float = field(
        default=0.1,
        metadata={
            "help": "Share of active blocks that the first update of --finetune_mode dynamic replaces; far less than "
            "in pre-training, for what is pruned here has been learned."
        },
    )
    warmup_steps: float = field(
        default=0.06, metadata={"help": "Linear warm-up: a number of steps, or below 1 a share of the run."}
    )

    def __post_init__(self) -> None:
        if self.finetune_mode not in FINETUNE_MODES:
            raise ValueError(
                f"`finetune_mode` must be one of {', '.join(FINETUNE_MODES)}. Got {self.finetune_mode!r}."
            )
        if self.finetune_mode != "dynamic":
            if self.num_topology_updates or self.topology_update_every:
                raise ValueError(
                    f"Topology updates need `finetune_mode` dynamic. Got {self.finetune_mode}. Change one of them."
                )
            self.num_topology_updates = 0
        super().__post_init__()


def prepare_finetuning_(model: PreTrainedModel, args: FinetuningArguments) -> PreTrainedModel:
    """
    Make `model` dense, in place, if `args.finetune_mode` says so, and fill in the learning rate and epochs that the
    user left open. To be called before the optimiser is made: densified weights need fresh moments.
    """
    was_sparse = bool(sparse_layers(model))
    if was_sparse and args.finetune_mode == "dense":
        densify_(model)
    mode = args.finetune_mode if was_sparse else "dense"
    recipe = FINETUNE_MODES[mode]
    if args.learning_rate is None:
        args.learning_rate = recipe.learning_rate
    if args.num_train_epochs is None:
        args.num_train_epochs = recipe.num_train_epochs
    logger.info(
        "Fine-tuning a %s model, mode %s: %s. Learning rate %g, %s.",
        f"{topology_summary(model).sparsity:.1%} sparse" if sparse_layers(model) else "dense",
        mode,
        recipe.does if was_sparse else "there are no sparse layers",
        args.learning_rate,
        f"{args.max_steps} steps" if args.max_steps > 0 else f"{args.num_train_epochs:g} epochs",
    )
    return model


def load_pretrained(
    auto_class: Any,
    name_or_path: str,
    *,
    sparsity: float | None = None,
    block_size: BlockSize | None = None,
    config: PretrainedConfig | None = None,
    **kwargs: Any,
) -> PreTrainedModel:
    """
    A checkpoint with a task's head, sparse as it was saved; or a dense one of any architecture, made sparse by keeping
    its largest blocks.

    Args:
        auto_class: a class such as [`~transformers.AutoModelForSequenceClassification`].
        name_or_path (`str`): folder or Hub name.
        sparsity (`float`, *optional*): for a dense checkpoint: the share of positions to leave out.
        block_size (`int`, `tuple[int, int]` or, for a BERT, `dict`, *optional*): side of a block, 16 if only the
            sparsity is given; see [`DynSparseBertConfig`].
        config (`PretrainedConfig`, *optional*): instead of the checkpoint's own.
        kwargs: passed to `from_pretrained`, such as `num_labels`.

    Raises:
        ValueError: if the checkpoint is sparse already, or a block size comes without a sparsity.
    """
    if sparsity is None:
        if block_size is not None:
            raise ValueError(f"`block_size` needs a `sparsity`. Got block size {block_size} alone. Give both or none.")
        return auto_class.from_pretrained(name_or_path, config=config, **kwargs)
    known = config or AutoConfig.from_pretrained(
        name_or_path, **{name: kwargs[name] for name in ("revision", "token", "cache_dir") if name in kwargs}
    )
    is_sparse = isinstance(known, DynSparseBertConfig) and known.sparsity > 0
    if is_sparse or getattr(known, "quantization_config", None) is not None:
        raise ValueError(
            f"`sparsity` is for dense checkpoints. Got {sparsity} for {name_or_path}, which is sparse or quantized "
            "already. Leave it out."
        )
    blocks: Any = 16 if block_size is None else block_size  # the quantizer refuses sizes by layer
    if known.model_type in ("bert", DynSparseBertConfig.model_type):
        sparse_class = auto_class._model_mapping[DynSparseBertConfig]
        if config is not None:
            dense_config = cast(BertConfig, config)
            kwargs["config"] = DynSparseBertConfig.from_stock(dense_config, sparsity=sparsity, block_size=blocks)
            return sparse_class.from_pretrained(name_or_path, **kwargs)
        return sparse_class.from_pretrained(name_or_path, sparsity=sparsity, block_size=blocks, **kwargs)
    settings = DynSparseQuantizationConfig(sparsity=sparsity, block_size=blocks)
    return auto_class.from_pretrained(name_or_path, config=config, quantization_config=settings, **kwargs)


def load_teacher(auto_class: Any, name_or_path: str, **kwargs: Any) -> PreTrainedModel:
    """
    A model to learn from.

    Raises:
        ValueError: if the checkpoint lacks a weight, its head for instance: a random head teaches nothing.
    """
    teacher, info = auto_class.from_pretrained(name_or_path, output_loading_info=True, **kwargs)
    if info["missing_keys"]:
        raise ValueError(
            f"`teacher` must be a model trained for this task. Got {name_or_path}, which lacks "
            f"{', '.join(sorted(info['missing_keys']))}. Fine-tune it first."
        )
    return teacher


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
        logger.warning(
            "`evaluate` cannot load the metric %s (%s): the same is computed here.",
            "/".join(filter(None, (name, config_name))),
            type(error).__name__,
        )
        return fallback
