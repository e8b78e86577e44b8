"""Floating-point operations per sequence, by the paper's count (arXiv:2108.06277, appendix on FLOPs)."""

from math import prod
from typing import Any

from transformers import BertConfig, PreTrainedModel

from ..nn.linear import LinearLayer
from .bert.configuration_dynsparse_bert import DynSparseBertConfig, encoder_shapes, layer_sizes
from .heads import body_linears


def flops_per_sequence(config_or_model: BertConfig | PreTrainedModel, seq_len: int) -> int:
    """
    Training FLOPs of one sequence without embeddings and heads: forward, input gradient and weight gradient,
    `3 * (2 * T * nnz + 4 * T² * hidden * layers)`; where layers have fewer heads, only those heads' share of hidden.

    Args:
        config_or_model (`BertConfig` or `PreTrainedModel`): a DynSparse or stock BERT configuration, or a model of
            one stack (encoder or decoder) whose configuration knows `hidden_size` and `num_hidden_layers`. A model's
            layers are counted as they are, each once: gated units and fused projections are in their shapes. Attention
            is counted as if every token saw all others, where a window limits it too.
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
        config, nnz = config_or_model.config, matrix_entries(config_or_model)
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


def dense_flops_per_sequence(model: PreTrainedModel, seq_len: int) -> int:
    """[`flops_per_sequence`] of the same model with dense layers."""
    return flops_per_sequence(model, seq_len) + 6 * seq_len * (
        matrix_entries(model, dense=True) - matrix_entries(model)
    )


def matrix_entries(model: PreTrainedModel, dense: bool = False) -> int:
    """Stored entries of all matrices between embeddings and head; or of the same model with dense layers."""
    return sum(
        (prod(layer.shape) if dense else layer.nnz) if isinstance(layer, LinearLayer) else layer.weight.numel()
        for layer in body_linears(model).values()
    )
