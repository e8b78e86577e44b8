"""What a checkpoint of a stock architecture says about its sparse layers."""

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, cast

from ..._transformers import QuantizationConfigMixin, register_quantization_config
from ...blocks.distributions import DISTRIBUTIONS
from ...blocks.sizes import as_block_shape, check_sparsity
from ...files import Kinds, check_object


METHOD = "dynsparse"


class LayersConfig(QuantizationConfigMixin):
    """Layers of this package in a model; `quantization_config` in its `config.json`."""

    kinds: ClassVar[Kinds]  # what JSON must hold

    @classmethod
    def check(cls, saved: dict[str, Any]) -> None:
        """
        Raises:
            ValueError: naming an entry of a `config.json` that is of another type than it must be.
        """
        check_object(saved, "`quantization_config`", cls.kinds)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """
        As in transformers, from the entry of a `config.json`.

        Raises:
            ValueError: for a name or type that is none of ours too.
        """
        cls.check(config_dict)
        try:
            return super().from_dict(config_dict, *args, **kwargs)
        except TypeError as error:
            raise ValueError(f"`quantization_config` must be what {cls.__name__} takes. Got {error}.") from error

    def get(self, name: str, default: Any = None) -> Any:
        """As of a dictionary: transformers reads the configuration of a model in memory like one from a file."""
        return getattr(self, name, default)

    @property
    def named_layers(self) -> Mapping[str, Any]:
        """The layers by module name, and what is known of each."""
        raise NotImplementedError


@register_quantization_config(METHOD)
class DynSparseQuantizationConfig(LayersConfig):
    """
    How a stock transformers model is made sparse; `quantization_config` in its `config.json`.

    Args:
        block_size (`int` or `[rows, columns]`, defaults to 16): side of a square block. Must divide both sides of
            every chosen layer.
        sparsity (`float`, defaults to 0.9): share of inactive positions over all chosen layers, in [0, 1).
        distribution (`str`, defaults to `"uniform"`): how the density is spread over them, `"uniform"` or `"erk"`.
        targets (`Iterable[str]`, defaults to all): shell-style patterns of module names, such as `"*.mlp.*"`.
        ignore (`Iterable[str]`, *optional*): patterns of layers that stay dense. By default heads, poolers and
            embeddings, as [`sparsify_`] says.
        nnzb (`dict[str, int]`, *optional*): the chosen layers by module name, and the active blocks of each. Written
            when a model has been made sparse, and then the only thing that counts: the other arguments are a record.

    Raises:
        ValueError: for a value out of range.

    Example:
        ```python
        >>> how = DynSparseQuantizationConfig(sparsity=0.9, block_size=16)
        >>> model = AutoModelForMaskedLM.from_pretrained("FacebookAI/roberta-base", quantization_config=how)
        ```
    """

    kinds = {
        "block_size": int | list[int],
        "sparsity": float,
        "distribution": str,
        "targets": list[str],
        "ignore": list[str],
        "nnzb": dict[str, int],
    }

    def __init__(
        self,
        block_size: int | tuple[int, int] | list[int] = 16,
        sparsity: float = 0.9,
        distribution: str = "uniform",
        targets: Iterable[str] = ("*",),
        ignore: Iterable[str] | None = None,
        nnzb: Mapping[str, int] | None = None,
        quant_method: str = METHOD,
    ) -> None:
        as_block_shape(block_size)
        if distribution not in DISTRIBUTIONS:
            raise ValueError(f"`distribution` must be one of {', '.join(DISTRIBUTIONS)}. Got {distribution!r}.")
        self.quant_method = cast(Any, quant_method)
        # Only what JSON knows: this becomes a part of config.json.
        self.block_size = block_size if isinstance(block_size, int) else list(block_size)
        self.sparsity = check_sparsity(sparsity)
        self.distribution = distribution
        self.targets = list(targets)
        self.ignore = None if ignore is None else list(ignore)
        self.nnzb = None if nnzb is None else dict(nnzb)

    @property
    def named_layers(self) -> dict[str, int]:
        """Active blocks of each layer; empty before there are any."""
        return self.nnzb or {}

    @property
    def block_shape(self) -> tuple[int, int]:
        """`(rows, columns)` of one block."""
        return as_block_shape(self.block_size)
