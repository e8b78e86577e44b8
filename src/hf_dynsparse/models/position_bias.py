"""
A distance bias in attention: what is far away counts for less, before a model has learnt what its positions mean.

It goes in through transformers' attention interface: `"sdpa"` becomes `"sdpa_distance_bias"`, which adds the bias to
the mask and calls `"sdpa"`. Fixed slopes as in ALiBi (arXiv:2108.12409, section 3) in both directions, or learned
buckets of distances as in T5 (arXiv:1910.10683, section 2.1).
"""

import inspect
import math
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig, PreTrainedModel

from .._transformers import init


KINDS = ("alibi", "t5")
SUFFIX = "_distance_bias"  # of the name of an attention implementation

# T5's: half of the buckets for what comes after, and half of these for one distance each.
BUCKETS, FARTHEST = 32, 128

# Fixed slopes take no more than this from a score. Weights of attention below e^-30 are nothing, and soon subnormal
# numbers, with which attention takes twice as long on CPUs.
MOST = 30.0

# How a configuration without a bias reads.
_WITHOUT: dict[str, Any] = {"position_bias": None, "position_bias_strength": 1.0}


class PositionBias(nn.Module):
    """
    What is added to the scores of attention, for all layers: `strength` times that of the kind.

    Args:
        kind (`str`): `"alibi"`: minus slope times distance; or `"t5"`: a learned number for each head and bucket of
            distances, which starts as that.
        heads (`int`): attention heads of a layer.
        strength (`float`): a factor. A buffer, so that changing it in place compiles nothing anew; not saved, for the
            configuration says it.
    """

    strength: torch.Tensor

    def __init__(self, kind: str, heads: int, strength: float) -> None:
        super().__init__()
        self.kind, self.first_strength = kind, strength
        self.in_force: Any = None  # the hook that keeps it so
        self.register_buffer("strength", torch.empty(()), persistent=False)
        # A plain parameter: an embedding would become int8 with the others.
        self.table = nn.Parameter(torch.empty(BUCKETS, heads)) if kind == "t5" else None
        self.reset_()

    @torch.no_grad()
    def reset_(self) -> None:
        """Begin, but for what a checkpoint has filled."""
        init.constant_(self.strength, self.first_strength)
        if self.table is not None:
            # Not zeros: without a bias attention does not find the neighbours, which is what it is for.
            nearest = bucket_distances(self.table.device)[:, None]  # [buckets, 1]
            init.copy_(self.table, -nearest * head_slopes(self.table.shape[1], self.table.device))

    def forward(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        """
        The bias `(1, heads, queries, keys)` in the dtype of `query` `(batch, heads, queries, head_size)`, for keys
        `(batch, heads, keys, head_size)` of which the last are at the positions of the queries.
        """
        heads, queries, keys = query.shape[1], query.shape[2], key.shape[2]
        positions = torch.arange(keys, device=query.device)
        offset = positions - positions[keys - queries :, None]  # [queries, keys], positive for what comes after
        strength = self.strength.float()
        if self.table is not None:
            bias = strength * nn.functional.embedding(bucket_of(offset), self.table).permute(2, 0, 1).float()
        else:
            bias = (-strength * head_slopes(heads, query.device)[:, None, None] * offset.abs()).clamp(min=-MOST)
        return bias.to(query.dtype)[None]


def head_slopes(heads: int, device: torch.device) -> torch.Tensor:
    """`2 ** (-6 h / (heads - 1))` of shape `(heads,)`: from 1 to 1/64."""
    return torch.exp2(-6.0 * torch.arange(heads, device=device) / max(heads - 1, 1))


def bucket_of(offset: torch.Tensor) -> torch.Tensor:
    """T5's bucket of each offset, key minus query: one for a distance below 8, then wider ones, the last from 128."""
    half, exact = BUCKETS // 2, BUCKETS // 4
    distance = offset.abs()
    share = torch.log(distance.clamp(min=exact) / exact) / math.log(FARTHEST / exact)
    far = (exact + (share * (half - exact)).long()).clamp(max=half - 1)
    return torch.where(distance < exact, distance, far) + half * (offset > 0)


def bucket_distances(device: torch.device) -> torch.Tensor:
    """The smallest distance of each bucket, of shape `(BUCKETS,)`."""
    half, exact = BUCKETS // 2, BUCKETS // 4
    buckets = torch.arange(BUCKETS, device=device) % half
    far = exact * (FARTHEST / exact) ** ((buckets - exact) / (half - exact))
    return torch.where(buckets < exact, buckets, far.ceil())


def attention_forward(
    inner: Callable[..., Any] | None,
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`inner`, or the eager attention of the model, with the bias of `module`, if it has one, in its mask."""
    bias: PositionBias | None = getattr(module, "position_bias", None)
    if inner is None:
        inner = sys.modules[type(module).__module__].eager_attention_forward
    mask = attention_mask if bias is None else _added(attention_mask, bias(query, key))
    attended: tuple[torch.Tensor, torch.Tensor | None] = inner(module, query, key, value, mask, **kwargs)
    return attended


def _added(mask: torch.Tensor | None, bias: torch.Tensor) -> torch.Tensor:
    """Of a Boolean or additive mask `(batch, 1, queries, keys)` and a bias: an additive mask."""
    least = torch.finfo(bias.dtype).min
    if mask is None:
        return bias
    if mask.dtype == torch.bool:
        return torch.where(mask, bias, least)
    return (mask + bias).clamp(min=least).to(bias.dtype)  # a sum below the least number would be minus infinity


def register_biased(implementation: str) -> None:
    """Let an attention implementation have a bias: one whose mask is a tensor of four dimensions."""
    inner = None if implementation == "eager" else AttentionInterface()[implementation]
    AttentionInterface.register(implementation + SUFFIX, partial(attention_forward, inner))
    AttentionMaskInterface.register(implementation + SUFFIX, AttentionMaskInterface()[implementation])


register_biased("sdpa")
register_biased("eager")


def strength_of(config: Any) -> float:
    """The strength of the bias that a configuration, an object or a dictionary, asks for; 0 without one."""
    get = config.get if isinstance(config, dict) else partial(getattr, config)
    return float(get("position_bias_strength", 1.0)) if get("position_bias", None) in KINDS else 0.0


def set_position_bias_(model: PreTrainedModel, strength: float, kind: str = "alibi") -> None:
    """
    Give the attention of a model a distance bias of this strength, in place, or take it out at 0. Its configuration
    says so.

    Raises:
        ValueError: for a model that has positions of its own kind, or whose attention cannot be reached.
    """
    config = model.config
    if strength and bias_of(model) is None:
        add_position_bias_(cast(PreTrainedModel, model.base_model), kind, strength)
    if (bias := bias_of(model)) is not None:
        bias.strength.fill_(strength)
        config.position_bias, config.position_bias_strength = bias.kind, strength
    if not strength:
        remove_position_bias_(model)


def bias_of(model: PreTrainedModel) -> PositionBias | None:
    """The distance bias of a model, if it has one."""
    return getattr(model.base_model, "position_bias", None)


def restore_position_bias_(model: Any) -> Any:
    """Give a model of a stock class, which has just been loaded, the bias that its configuration asks for."""
    if getattr(model.config, "position_bias", None) == "alibi" and bias_of(model) is None:
        set_position_bias_(model, strength_of(model.config))
    return model


def add_position_bias_(base: PreTrainedModel, kind: str, strength: float) -> None:
    """
    Put a bias into a base model, in place.

    Raises:
        ValueError: see `set_position_bias_`.
    """
    attentions = attentions_of(base)
    bias = PositionBias(kind, base.config.num_attention_heads, strength).to(base.device)
    base.position_bias = bias
    for attention in attentions:
        vars(attention)["position_bias"] = bias  # a reference: the module stands in the tree once
    # The implementation may be changed at any time; the bias then stays.
    bias.in_force = base.register_forward_pre_hook(keep_in_force_)
    keep_in_force_(base)


def remove_position_bias_(model: PreTrainedModel) -> None:
    """Make a stock model of one with a bias, in place; nothing happens to one without."""
    base, config = model.base_model, model.config
    if (bias := bias_of(model)) is not None:
        bias.in_force.remove()
        del base.position_bias
        for module in base.modules():
            vars(module).pop("position_bias", None)
        config._attn_implementation = config._attn_implementation.removesuffix(SUFFIX)
    for name, default in _WITHOUT.items():
        if hasattr(type(config), name):
            setattr(config, name, default)
        else:
            vars(config).pop(name, None)


def keep_in_force_(base: Any, *_: Any) -> None:
    """
    Before the forward pass of a base model with a bias: have its attention implementation be one with it.

    Raises:
        ValueError: for one that takes no additive mask.
    """
    config = base.config
    if config._attn_implementation.endswith(SUFFIX):
        return
    name = config._attn_implementation + SUFFIX
    if name not in AttentionInterface():
        raise ValueError(
            f"A distance bias is added to the mask of attention, by `sdpa` or `eager`. Got {type(base).__name__} with "
            f"{config._attn_implementation!r}. Load it with attn_implementation='sdpa'."
        )
    config._attn_implementation = name


def attentions_of(base: PreTrainedModel) -> list[nn.Module]:
    """
    The self-attention of an encoder with absolute positions.

    Raises:
        ValueError: if it is no such model.
    """
    positions = [
        name
        for name, module in base.named_modules()
        if isinstance(module, nn.Embedding) and name.endswith("position_embeddings")
    ]
    found = [module for module in base.modules() if _asks_interface(module) and "Cross" not in type(module).__name__]
    received = None
    if not positions:
        received = "has none: its attention knows distances already"
    elif not found:
        received = "has an attention of its own, which does not use transformers' attention interface"
    elif base.config.is_encoder_decoder or getattr(base.config, "is_decoder", False):
        received = "is a decoder"
    if received is not None:
        raise ValueError(
            "A distance bias is for encoders with absolute positions (`position_embeddings`), such as BERT, RoBERTa, "
            f"ELECTRA and DistilBERT. Got {type(base).__name__}, which {received}. Leave `distance_bias` and "
            "`position_bias` out."
        )
    return found


def _asks_interface(module: nn.Module) -> bool:
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names


def check_stock(config: PretrainedConfig, what: str) -> None:
    """
    Before a model becomes one of a class of transformers.

    Raises:
        ValueError: if it has a distance bias, which that class leaves out.
    """
    if strength_of(config):
        raise ValueError(
            f"{what} must have no distance bias, which classes of transformers do not know. Got position_bias="
            f"{config.position_bias!r} of strength {config.position_bias_strength:g}. Train on with --distance_bias "
            "1:0@0.7, which lets it fall to nothing, and take that model."
        )
