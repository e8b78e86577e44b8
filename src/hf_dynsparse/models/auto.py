"""Models of transformers by name, made sparse as they are loaded; teachers."""

from collections.abc import Iterable
from typing import Any, cast

from transformers import AutoConfig, BertConfig, PretrainedConfig, PreTrainedModel

from ..blocks.distributions import active_blocks
from ..blocks.sizes import BlockSize, block_shapes_of
from ..calibration import Batch, Calibration
from . import DynSparseBertConfig
from .bert.configuration_dynsparse_bert import encoder_shapes
from .position_bias import restore_position_bias_
from .sparsify import sparsify_
from .stock.configuration import METHOD, DynSparseQuantizationConfig


def load_pretrained(
    auto_class: Any,
    name_or_path: str,
    *,
    sparsity: float | None = None,
    block_size: BlockSize | None = None,
    all_blocks: bool = False,
    config: PretrainedConfig | None = None,
    calibration: Calibration | Iterable[Batch] | None = None,
    **kwargs: Any,
) -> PreTrainedModel:
    """
    A checkpoint with a task's head, sparse as it was saved; or a dense one of any architecture, made sparse by keeping
    its largest blocks or, with `calibration`, those that matter most to its outputs.

    Args:
        auto_class: a class such as [`~transformers.AutoModelForSequenceClassification`].
        name_or_path (`str`): folder or Hub name.
        sparsity (`float`, *optional*): for a dense checkpoint: the share of positions to leave out. With `all_blocks`
            for a sparse one too, which keeps those that it has.
        block_size (`int`, `tuple[int, int]` or, for a BERT, `dict`, *optional*): side of a block, 16 if only the
            sparsity is given; see [`DynSparseBertConfig`].
        all_blocks (`bool`): whether a dense checkpoint keeps all its blocks nevertheless, as active ones: the start of
            a run that leads to `sparsity` as its `final_sparsity`.
        config (`PretrainedConfig`, *optional*): instead of the checkpoint's own.
        calibration (`Calibration` or `Iterable[Mapping[str, torch.Tensor]]`, *optional*): see
            [`~hf_dynsparse.sparsify_`].
        kwargs: passed to `from_pretrained`, such as `num_labels`.

    Raises:
        ValueError: if the checkpoint is sparse already, a block size comes without a sparsity, or a `calibration`
            without blocks to choose from.
    """
    if calibration is not None and (sparsity is None or all_blocks):
        raise ValueError(
            "`calibration` chooses the blocks that a dense checkpoint keeps at its `sparsity`. Got "
            f"sparsity={sparsity} and all_blocks={all_blocks}. Leave it out."
        )
    if sparsity is None:
        if block_size is not None:
            raise ValueError(f"`block_size` needs a `sparsity`. Got block size {block_size} alone. Give both or none.")
        given = auto_class.from_pretrained(name_or_path, config=config, **kwargs)
        return cast(PreTrainedModel, restore_position_bias_(given))
    known = config or AutoConfig.from_pretrained(
        name_or_path, **{name: kwargs[name] for name in ("revision", "token", "cache_dir") if name in kwargs}
    )
    saved = saved_sparsity(known)
    if all_blocks and block_size is None and saved:
        if sparsity <= saved:
            raise ValueError(
                f"A sparse model is pruned further, to a higher `sparsity`. Got {sparsity} for {name_or_path}, which "
                f"has {saved}. Give more, or begin with a denser one."
            )
        return cast(PreTrainedModel, auto_class.from_pretrained(name_or_path, config=config, **kwargs))
    if not is_dense(known):
        raise ValueError(
            f"`sparsity` is for dense checkpoints. Got {sparsity} for {name_or_path}, which is sparse or quantized "
            "already. Leave it out."
        )
    blocks: Any = 16 if block_size is None else block_size  # the quantizer refuses sizes by layer
    if known.model_type in ("bert", DynSparseBertConfig.model_type):
        sparse_class, dense = auto_class._model_mapping[DynSparseBertConfig], cast(BertConfig, known)
        how = every_block(dense, blocks) if all_blocks else {"sparsity": sparsity, "block_size": blocks}
        if config is not None:
            how = {"config": DynSparseBertConfig.from_stock(dense, **how)}
        return sparse_class.from_pretrained(name_or_path, **how, calibration=calibration, **kwargs)
    if calibration is not None:
        given = auto_class.from_pretrained(name_or_path, config=config, **kwargs)
        return cast(PreTrainedModel, sparsify_(given, blocks, sparsity, calibration=calibration))
    settings = DynSparseQuantizationConfig(sparsity=0.0 if all_blocks else sparsity, block_size=blocks)
    model = auto_class.from_pretrained(name_or_path, config=config, quantization_config=settings, **kwargs)
    model.config.quantization_config.sparsity = sparsity  # a record; how many blocks there are stands beside it
    return model


def is_dense(config: PretrainedConfig) -> bool:
    """Whether a model of this configuration has no sparse and no quantised layer."""
    if getattr(config, "quantization_config", None) is not None:
        return False
    return not (isinstance(config, DynSparseBertConfig) and config.nnzb_per_layer())


def saved_sparsity(config: PretrainedConfig) -> float:
    """What the configuration says of a model whose sparse layers hold floating-point numbers; else 0."""
    how = getattr(config, "quantization_config", None)
    if how is not None:
        return float(how["sparsity"]) if how["quant_method"] == METHOD else 0.0
    return 0.0 if is_dense(config) else float(cast(DynSparseBertConfig, config).sparsity)


def every_block(config: BertConfig, block_size: BlockSize) -> dict[str, Any]:
    """The arguments of a [`DynSparseBertConfig`] of the dimensions of a dense one, all of whose blocks are active."""
    shapes = encoder_shapes(config)
    nnzb = active_blocks(shapes, 0.0, block_shapes_of(shapes, block_size))
    return {"sparsity": 0.0, "block_size": block_size, "nnzb": nnzb}


def load_teacher(auto_class: Any, name_or_path: str, *, unused: str | None = None, **kwargs: Any) -> PreTrainedModel:
    """
    A model to learn from.

    Args:
        unused (`str`, *optional*): in the names of weights of which nothing is learned.

    Raises:
        ValueError: if the checkpoint lacks a weight, its head for instance: a random head teaches nothing.
    """
    teacher, info = auto_class.from_pretrained(name_or_path, output_loading_info=True, **kwargs)
    missing = sorted(key for key in info["missing_keys"] if unused is None or unused not in key)
    if missing:
        raise ValueError(
            f"`teacher` must be a model trained for this task. Got {name_or_path}, which lacks "
            f"{', '.join(missing)}. Fine-tune it first."
        )
    return cast(PreTrainedModel, restore_position_bias_(teacher))
