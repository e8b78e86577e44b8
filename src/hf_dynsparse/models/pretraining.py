"""Where pre-training starts: the configuration of a preset, or of a checkpoint to go on from."""

from typing import Any

from transformers import AutoConfig, BertConfig

from ..blocks.sizes import BlockSize, block_shapes_of
from . import DynSparseBertConfig
from .auto import every_block
from .bert.configuration_dynsparse_bert import PRESETS


def preset_config(
    preset: str,
    *,
    sparsity: float | None = None,
    block_size: BlockSize | None = None,
    distribution: str = "uniform",
    overrides: str | None = None,
) -> DynSparseBertConfig:
    """
    The configuration of a fresh model.

    Args:
        preset (`str`): size of the BERT, such as `"mini"`.
        sparsity (`float`, *optional*): 0.9 if it is not given.
        block_size (`int`, `tuple[int, int]` or `dict`, *optional*): 16 if it is not given.
        distribution (`str`): of the density over the layers.
        overrides (`str`, *optional*): other fields, such as `"num_hidden_layers=6,hidden_dropout_prob=0.1"`.

    Raises:
        ValueError: for a preset that there is not, or a field that does not fit.
    """
    if preset not in PRESETS:
        raise ValueError(f"`--preset` must be one of {', '.join(PRESETS)}. Got {preset!r}.")
    config = DynSparseBertConfig.preset(
        preset,
        sparsity=0.9 if sparsity is None else sparsity,
        block_size=16 if block_size is None else block_size,
        distribution=distribution,
    )
    if overrides:
        config.update_from_string(overrides)
        config = DynSparseBertConfig.from_dict(config.to_dict())  # validates it again
    return config


def continued_config(
    config: BertConfig,
    source: str,
    *,
    sparsity: float | None = None,
    block_size: BlockSize | None = None,
    distribution: str = "uniform",
    keep_dense: bool = False,
    gradual: bool = False,
) -> DynSparseBertConfig:
    """
    The configuration with which a run goes on from a checkpoint. A sparse one keeps its blocks. A dense one keeps its
    largest blocks, stays dense, or begins with all its blocks.

    Args:
        config (`BertConfig`): of the checkpoint.
        source (`str`): what the checkpoint is called in an error.
        sparsity, block_size, distribution: of the run, where given.
        keep_dense (`bool`): whether a dense checkpoint stays dense.
        gradual (`bool`): whether the run changes the density: it leads to `sparsity`, and does not start with it.

    Raises:
        ValueError: for a checkpoint that is no BERT, a sparse one with other blocks, or a sparsity that is missing.
    """
    if not isinstance(config, BertConfig):
        raise ValueError(f"`--model_name_or_path` must name a BERT. Got {source}, a {config.model_type}.")
    if not isinstance(config, DynSparseBertConfig):
        config = DynSparseBertConfig.from_stock(config, sparsity=0.0)
    if config.nnzb_per_layer():
        same_blocks = block_size is None or block_shapes_of(config.block_shapes(), block_size) == config.block_shapes()
        if keep_dense or not same_blocks:
            raise ValueError(
                f"A sparse checkpoint keeps its blocks. Got {source} of block size {config.block_size} with "
                f"{'--dense_baseline' if same_blocks else f'--block_size {block_size}'}. Leave that out."
            )
        if not gradual and sparsity not in (None, config.sparsity):
            raise ValueError(
                f"A sparse checkpoint keeps its sparsity. Got --sparsity {sparsity} for {source} of "
                f"{config.sparsity}. Leave it out, or choose a --method that changes the density, such as prune_ofa."
            )
        return config
    if keep_dense or (sparsity is None and block_size is None and not gradual):
        return config
    if sparsity is None:
        raise ValueError(
            f"A dense checkpoint is pruned to a `--sparsity`. Got {source} with --block_size {block_size} or a "
            "--method that changes the density, and none. Give it, or --dense_baseline to train on as it is."
        )
    blocks = 16 if block_size is None else block_size
    how = every_block(config, blocks) if gradual else {"sparsity": sparsity, "block_size": blocks}
    return DynSparseBertConfig.from_stock(config, distribution=distribution, **how)


def first_pattern(source: str | None, **hub: Any) -> str:
    """Where the first topology of a run comes from, for the card; `source` is the checkpoint that it goes on from."""
    if source is None:
        return "uniformly random blocks"
    config = AutoConfig.from_pretrained(source, **hub)
    is_sparse = isinstance(config, DynSparseBertConfig) and config.nnzb_per_layer()
    return "that of the checkpoint" if is_sparse else "the blocks of largest L1 norm"
