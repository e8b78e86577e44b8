"""What a DynSparse BERT is: the stock configuration plus sparsity, block size and distribution."""

import logging
import math
from math import prod
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import BertConfig, PretrainedConfig

from ...blocks.distributions import DISTRIBUTIONS, active_blocks
from ...blocks.sizes import BlockSize, as_block_shape, block_grid, block_shapes_of, check_sparsity
from ...nn.linear import INITIAL_TOPOLOGIES, SPARSE_INITS
from ..position_bias import KINDS


logger = logging.getLogger(__name__)

# layers, hidden, heads, intermediate (Turc et al., arXiv:1908.08962; the family of arXiv:2108.06277, section 4)
PRESETS: dict[str, tuple[int, int, int, int]] = {
    "tiny": (2, 128, 2, 512),
    "mini": (4, 256, 4, 1024),
    "small": (4, 512, 8, 2048),
    "medium": (8, 512, 8, 2048),
    "base": (12, 768, 12, 3072),
    "large": (24, 1024, 16, 4096),
}

# Dropout only for models larger than BERT-Small (arXiv:2108.06277, section 3).
_PRESETS_WITHOUT_DROPOUT = ("tiny", "mini", "small")

# More than any model has. A damaged or malicious config.json must not exhaust time and memory before a weight is read.
LIMITS = {
    **dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size", "max_position_embeddings"), 10**8),
    **dict.fromkeys(("num_attention_heads", "type_vocab_size", "num_labels"), 10**6),
    "num_hidden_layers": 10**4,
}


def layer_sizes(config: Any) -> list[tuple[int, int]]:
    """Attention heads and intermediate neurons of every layer of a BERT encoder, stock or ours."""
    heads = [config.num_attention_heads] * config.num_hidden_layers
    neurons = [config.intermediate_size] * config.num_hidden_layers
    # By name: where a checkpoint brings its own code, the class may have been loaded twice.
    if config.model_type == DynSparseBertConfig.model_type:
        heads, neurons = config.heads_per_layer or heads, config.intermediate_sizes or neurons
    return list(zip(heads, neurons, strict=True))


def encoder_shapes(config: BertConfig) -> dict[str, tuple[int, int]]:
    """`(out_features, in_features)` of every linear layer of a BERT encoder, by its name inside the encoder."""
    hidden, head_size = config.hidden_size, config.hidden_size // config.num_attention_heads
    shapes: dict[str, tuple[int, int]] = {}
    for number, (heads, neurons) in enumerate(layer_sizes(config)):
        one_layer = {
            "attention.self.query": (heads * head_size, hidden),
            "attention.self.key": (heads * head_size, hidden),
            "attention.self.value": (heads * head_size, hidden),
            "attention.output.dense": (hidden, heads * head_size),
            "intermediate.dense": (neurons, hidden),
            "output.dense": (hidden, neurons),
        }
        shapes |= {f"layer.{number}.{name}": shape for name, shape in one_layer.items()}
    return shapes


@strict
class DynSparseBertConfig(BertConfig):
    r"""
    Configuration of a BERT whose encoder stores active blocks only (arXiv:2108.06277). All arguments of
    [`~transformers.BertConfig`] are accepted too.

    Args:
        sparsity (`float`, defaults to 0.9):
            Share of inactive positions of every linear layer of the encoder, in [0, 1). 0 gives dense layers.
        block_size (`int`, `[rows, columns]` or `dict[str, int]`, defaults to 16):
            Side of a square block; 1 is unstructured. Must divide both sides of every encoder matrix. Or sizes by
            shell-style patterns of layer names such as `{"*attention*": 4, "*": 16}`: the longest that matches counts.
        distribution (`str`, defaults to `"uniform"`):
            How the density is spread over the layers: `"uniform"` (the paper) or `"erk"`.
        nnzb (`dict[str, int]`, *optional*):
            Number of active blocks of each sparse layer, by its name inside the encoder such as
            `"layer.0.attention.self.query"`; a layer not named is dense. Overrides `sparsity` and `distribution`:
            `sparsity` is then what it amounts to, for information.
        sparse_prediction (`bool`, defaults to `True`):
            Whether the masked-language-modelling head computes logits at masked positions only while training.
        sparse_init (`str`, defaults to `"normal"`):
            Initial values of sparse layers: `"normal"` (the paper) draws them as those of a dense layer; `"fan_in"`
            makes them larger by `sqrt(inputs / active inputs)` of each block row, for outputs of the same variance.
        initial_topology (`str`, defaults to `"random"`):
            Where the first blocks are: anywhere (the paper), or `"balanced"`: as many in each block row, and in each
            block column.
        position_bias (`str`, *optional*):
            A distance bias in attention beside the absolute positions: `"alibi"`, fixed slopes (arXiv:2108.12409), or
            `"t5"`, learned buckets of distances that all layers share (arXiv:1910.10683). Stock classes have none.
        position_bias_strength (`float`, defaults to 1.0):
            A factor of the bias.

    Raises:
        StrictDataclassError: from construction, for a value of the wrong type or out of range.

    Example:
        ```python
        >>> DynSparseBertConfig.preset("medium", sparsity=0.9, block_size=16).hidden_size
        512
        ```
    """

    model_type = "dynsparse_bert"

    sparsity: float | int = 0.9
    block_size: BlockSize = 16
    distribution: str = "uniform"
    nnzb: dict[str, int] | None = None
    sparse_prediction: bool = True
    sparse_init: str = "normal"
    initial_topology: str = "random"
    heads_per_layer: list[int] | None = None
    intermediate_sizes: list[int] | None = None
    position_bias: str | None = None
    position_bias_strength: float | int = 1.0

    def validate_heads(self) -> None:
        """Check that the heads share the hidden size evenly."""
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"`num_attention_heads` must divide `hidden_size` = {self.hidden_size}. Got "
                f"{self.num_attention_heads} heads. Choose a divisor."
            )

    def validate_layer_sizes(self) -> None:
        """Check heads and neurons of each layer. Validators run by name, in order: this one before those of blocks."""
        for name, limit in (("heads_per_layer", "num_attention_heads"), ("intermediate_sizes", "intermediate_size")):
            sizes, most = getattr(self, name), getattr(self, limit)
            if sizes is None:
                continue
            if len(sizes) != self.num_hidden_layers:
                raise ValueError(
                    f"`{name}` must have an entry for each of {self.num_hidden_layers} layers. Got {len(sizes)}. Give "
                    "as many, or none for layers of one size."
                )
            for number, size in enumerate(sizes):
                if not 1 <= size <= most:
                    raise ValueError(
                        f"`{name}` must lie in [1, {most}], `{limit}`. Got {size} for layer {number}. A layer cannot "
                        "be empty: leave it at least one."
                    )

    def validate_sparsity(self) -> None:
        """Check sparsity, distribution and block size against the shapes of the encoder."""
        check_sparsity(self.sparsity)
        self.block_shapes()
        if self.distribution not in DISTRIBUTIONS:
            raise ValueError(f"`distribution` must be one of {', '.join(DISTRIBUTIONS)}. Got {self.distribution!r}.")
        if self.nnzb is None:
            self.nnzb_per_layer()

    def validate_initialization(self) -> None:
        """Check how values and topology begin."""
        for name, known in (("sparse_init", SPARSE_INITS), ("initial_topology", INITIAL_TOPOLOGIES)):
            if getattr(self, name) not in known:
                raise ValueError(f"`{name}` must be one of {', '.join(known)}. Got {getattr(self, name)!r}.")

    def validate_position_bias(self) -> None:
        """Check the distance bias: every head has a slope of its own, in all layers."""
        if self.position_bias is None:
            return
        if self.position_bias not in KINDS:
            raise ValueError(f"`position_bias` must be one of {', '.join(KINDS)}. Got {self.position_bias!r}.")
        if not 0 <= self.position_bias_strength < math.inf:
            raise ValueError(
                f"`position_bias_strength` must be a number from 0 on. Got {self.position_bias_strength}. 1 is usual."
            )
        if self.heads_per_layer is not None:
            raise ValueError(
                "`position_bias` needs as many heads in every layer: each has its own slope. Got heads_per_layer="
                f"{self.heads_per_layer}. Train on with --distance_bias 1:0@0.7 before heads are taken out."
            )

    def validate_nnzb(self) -> None:
        """Check numbers of active blocks against the shapes of the encoder."""
        shapes, blocks = encoder_shapes(self), self.block_shapes()
        for name, nnzb in (self.nnzb or {}).items():
            if name not in shapes:
                raise ValueError(
                    f"`nnzb` must name layers of the encoder. Got {name!r}. Choose from {', '.join(shapes)}."
                )
            rows, columns = block_grid(shapes[name], blocks[name], f"`{name}`")
            if not 1 <= nnzb <= rows * columns:
                raise ValueError(
                    f"`nnzb` of {name} must lie in [1, {rows * columns}]. Got {nnzb}. Leave the layer out to make it "
                    "dense."
                )

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> "DynSparseBertConfig":
        """
        A member of the family tiny, mini, small, medium, base, large; dropout 0.1 above small, else 0.

        Raises:
            ValueError: for an unknown name.
        """
        if name not in PRESETS:
            raise ValueError(f"`preset` must be one of {', '.join(PRESETS)}. Got {name!r}.")
        layers, hidden, heads, intermediate = PRESETS[name]
        dropout = 0.0 if name in _PRESETS_WITHOUT_DROPOUT else 0.1
        arguments = {
            "num_hidden_layers": layers,
            "hidden_size": hidden,
            "num_attention_heads": heads,
            "intermediate_size": intermediate,
            "hidden_dropout_prob": dropout,
            "attention_probs_dropout_prob": dropout,
        }
        return cls(**{**arguments, **overrides})

    @classmethod
    def from_stock(cls, config: BertConfig, **overrides: Any) -> "DynSparseBertConfig":
        """The configuration of a sparse model with the dimensions of a dense one; the inverse of `to_stock`."""
        return cls.from_dict(_without_identity(config.to_dict()), **overrides)

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: Any, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """As in transformers. A dense BERT is read as one of ours, which says so if nothing tells how sparse."""
        config_dict, unused = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if config_dict.get("model_type") != "bert":
            return config_dict, unused
        if not {"sparsity", "block_size", "nnzb"} & kwargs.keys():
            logger.warning(
                "%s is a dense BERT and neither `sparsity` nor `block_size` is given: the defaults apply, sparsity %g "
                "and block size %s.",
                pretrained_model_name_or_path,
                cls.sparsity,
                cls.block_size,
            )
        return _without_identity(config_dict), unused

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in transformers; `sparsity`, `block_size` and the like are checked together with the dimensions."""
        for name, limit in LIMITS.items():
            given = kwargs.get(name, config_dict.get(name, 1))
            if isinstance(given, int | float) and not 1 <= given <= limit:
                raise ValueError(f"`{name}` must lie in [1, {limit}]. Got {given}. Mend config.json.")
        # Else the defaults would be checked first, and what is given not at all.
        ours = {name: kwargs.pop(name) for name in _OURS & kwargs.keys()}
        return super().from_dict({**config_dict, **ours}, **_without_identity(kwargs))

    def to_dict(self) -> dict[str, Any]:
        """As in transformers; what a model does not have, such as lists of sizes or a distance bias, is left out."""
        optional = {"heads_per_layer", "intermediate_sizes", "position_bias"}
        fields = {key: value for key, value in super().to_dict().items() if value is not None or key not in optional}
        if self.position_bias is None:
            fields.pop("position_bias_strength", None)
        return fields

    def to_stock(self) -> BertConfig:
        """
        The configuration of the dense model of the same size, without what is ours; all its layers have
        `num_attention_heads` heads and `intermediate_size` neurons.
        """
        return BertConfig(
            **{key: value for key, value in _without_identity(self.to_dict()).items() if key not in _OURS}
        )

    @property
    def block_shape(self) -> tuple[int, int]:
        """
        `(rows, columns)` of one block, in a model whose layers have blocks of one size.

        Raises:
            ValueError: if they have several.
        """
        if isinstance(self.block_size, dict):
            raise ValueError(
                f"`block_shape` is that of all layers. Got `block_size` {self.block_size}, one by name. Ask "
                "`block_shapes()`."
            )
        return as_block_shape(self.block_size)

    def block_shapes(self) -> dict[str, tuple[int, int]]:
        """`(rows, columns)` of one block of each encoder layer, by its name inside the encoder."""
        return block_shapes_of(encoder_shapes(self), self.block_size)

    def nnzb_per_layer(self) -> dict[str, int]:
        """Number of active blocks of each encoder layer, by its name inside the encoder; empty for a dense model."""
        if self.nnzb is not None:
            return dict(self.nnzb)
        if not self.sparsity:
            return {}
        return active_blocks(encoder_shapes(self), self.sparsity, self.block_shapes(), self.distribution)

    def set_nnzb(self, nnzb: dict[str, int]) -> None:
        """Say how many blocks each sparse layer has; `sparsity` becomes what that amounts to."""
        self.nnzb = nnzb
        self.sparsity = 1.0 - self.num_active_entries() / sum(map(prod, encoder_shapes(self).values()))

    def num_active_entries(self) -> int:
        """Active entries `nnz` of all encoder matrices."""
        nnzb, blocks = self.nnzb_per_layer(), self.block_shapes()
        return sum(
            nnzb[name] * prod(blocks[name]) if name in nnzb else prod(shape)
            for name, shape in encoder_shapes(self).items()
        )


_OURS = frozenset(DynSparseBertConfig.__annotations__)


def _without_identity(config_dict: dict[str, Any]) -> dict[str, Any]:
    """A configuration as a dictionary, less what says whose it is."""
    identity = {"model_type", "architectures", "transformers_version"}
    return {key: value for key, value in config_dict.items() if key not in identity}


def count_units(config: PretrainedConfig) -> dict[str, list[int]]:
    """Attention heads and intermediate neurons by layer, of a BERT whose layers have numbers of their own."""
    if not isinstance(config, DynSparseBertConfig) or not (config.heads_per_layer or config.intermediate_sizes):
        return {}
    heads, neurons = zip(*layer_sizes(config), strict=True)
    return {"attention heads": list(heads), "intermediate neurons": list(neurons)}
