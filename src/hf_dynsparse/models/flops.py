"""Floating-point operations per sequence, by the paper's count (arXiv:2108.06277, appendix on FLOPs)."""

from typing import Any

from torch import nn
from transformers import BertConfig, Conv1D, PreTrainedModel

from ..nn.linear import LinearLayer
from .bert.configuration_dynsparse_bert import DynSparseBertConfig, encoder_shapes, layer_sizes
from .heads import body_modules


def flops_per_sequence(config_or_model: BertConfig | PreTrainedModel, seq_len: int) -> int:
    """
    Training FLOPs of one sequence without embeddings and heads: forward, input gradient and weight gradient,
    `3 * (2 * T * nnz + 4 * T² * hidden * layers)`; where layers have fewer heads, only those heads' share of hidden.

    Args:
        config_or_model (`BertConfig` or `PreTrainedModel`): a DynSparse or stock BERT configuration, or a model of
            one stack (encoder or decoder) whose configuration knows `hidden_size` and `num_hidden_layers`. A model's
            layers are counted as they are, its attention as if every token saw all others.
        seq_len (`int`): tokens per sequence, `T`.

    Example:
        ```python
        >>> flops_per_sequence(DynSparseBertConfig.preset("mini", sparsity=0.0), seq_len=128)
        2617245696
        ```
    """
    return 3 * inference_flops_per_sequence(config_or_model, seq_len)


def inference_flops_per_sequence(config_or_model: BertConfig | PreTrainedModel, seq_len: int) -> int:
    """FLOPs of one forward pass over one sequence: a third of `flops_per_sequence`."""
    if isinstance(config_or_model, PreTrainedModel):
        config, nnz = config_or_model.config, _active_entries(config_or_model)
    else:
        config = config_or_model
        is_sparse = isinstance(config, DynSparseBertConfig)
        nnz = config.num_active_entries() if is_sparse else sum(o * i for o, i in encoder_shapes(config).values())
    # The second term is QK^T and AV.
    return 2 * seq_len * nnz + 4 * seq_len**2 * _attention_width(config)


def _attention_width(config: Any) -> int:
    """Rows of the queries of all layers together."""
    if not isinstance(config, DynSparseBertConfig):
        return int(config.hidden_size * config.num_hidden_layers)
    head_size = config.hidden_size // config.num_attention_heads
    return head_size * sum(heads for heads, _ in layer_sizes(config))


def _active_entries(model: PreTrainedModel) -> int:
    return sum(
        module.nnz if isinstance(module, LinearLayer) else module.weight.numel()
        for module in body_modules(model).values()
        if isinstance(module, nn.Linear | Conv1D | LinearLayer)
    )
