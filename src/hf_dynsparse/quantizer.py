"""
Sparse layers in any transformers architecture: `sparsify_`, `densify_`, and checkpoints that `from_pretrained` reads.

transformers lets a *quantizer* change the modules of a model before its weights arrive, and remembers it in
`config.json`. That is what serves here; nothing is quantised, and every weight keeps its dtype.
"""

import copy
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any, TypeVar, cast

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from . import nn as plain
from .body import body_modules
from .completeness import GIVEN, check_loaded, check_places, is_loaded
from .distributions import DISTRIBUTIONS, active_blocks
from .integrity import separate_, verify_weights, warn_of_nonfinite, with_checksums
from .json_files import Kinds, check_object
from .layout import as_block_shape, block_grid, check_sparsity
from .models.bert.configuration_dynsparse_bert import encoder_shapes
from .models.bert.modeling_dynsparse_bert import DynSparseBertPreTrainedModel
from .nn import DENSE_PARTS, TRAINING_BUFFERS, BlockSparseLinear, sparse_layers
from .readme import write_readmes_


METHOD = "dynsparse"
# What JSON must hold of a `DynSparseQuantizationConfig`.
KINDS: Kinds = {
    "block_size": int | list[int],
    "sparsity": float,
    "distribution": str,
    "targets": list[str],
    "ignore": list[str],
    "nnzb": dict[str, int],
}

About = TypeVar("About")  # what is known of a layer


class SparseLinear(BlockSparseLinear):
    """A [`BlockSparseLinear`] in a stock transformers model."""

    @property
    def weight(self) -> torch.Tensor:
        """
        A stand-in of the dense shape, for architectures whose code asks a linear layer for the dtype, device or shape
        of its weight. It takes no memory, and is NaN throughout: to compute with it would be an error.
        """
        stand_in: Any = self.values.new_full((), math.nan).expand(self.shape)
        stand_in._is_hf_initialized = True  # the initialisation of some architectures is told to leave it alone
        return stand_in


class SparseConv1D(SparseLinear):
    """In the place of a [`~transformers.pytorch_utils.Conv1D`]: a linear layer of GPT-2, stored transposed."""

    @classmethod
    def from_dense(
        cls,
        linear: Any,
        block_size: int | tuple[int, int] = 16,
        sparsity: float = 0.9,
        *,
        nnzb: int | None = None,
    ) -> BlockSparseLinear:
        """See [`BlockSparseLinear.from_dense`]; `linear` is a `Conv1D`."""
        straight = nn.Linear(linear.nx, linear.nf, device="meta").train(linear.training)
        straight.weight = nn.Parameter(linear.weight.detach().T, requires_grad=linear.weight.requires_grad)
        straight.bias = linear.bias
        return super().from_dense(straight, block_size, sparsity, nnzb=nnzb)

    def to_linear(self) -> Any:
        """A `Conv1D` with the same outputs."""
        straight = super().to_linear()
        with torch.device("meta"):
            conv = Conv1D(self.out_features, self.in_features).train(self.training)
        conv.weight = nn.Parameter(straight.weight.detach().T.contiguous(), straight.weight.requires_grad)
        conv.bias = straight.bias
        return conv


SPARSE_TYPES: dict[type[nn.Module], type[SparseLinear]] = {nn.Linear: SparseLinear, Conv1D: SparseConv1D}


@register_quantization_config(METHOD)
class DynSparseQuantizationConfig(QuantizationConfigMixin):
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

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """
        As in transformers, from the entry of a `config.json`.

        Raises:
            ValueError: for a name or type that is none of ours too.
        """
        check_object(config_dict, "`quantization_config`", KINDS)
        try:
            return super().from_dict(config_dict, *args, **kwargs)
        except TypeError as error:
            raise ValueError(f"`quantization_config` must be what {cls.__name__} takes. Got {error}.") from error

    @property
    def block_shape(self) -> tuple[int, int]:
        """`(rows, columns)` of one block."""
        return as_block_shape(self.block_size)

    def get(self, name: str, default: Any = None) -> Any:
        """As of a dictionary: transformers reads the configuration of a model in memory like one from a file."""
        return getattr(self, name, default)


@register_quantizer(METHOD)
class DynSparseQuantizer(HfQuantizer):
    """
    Puts sparse layers into a stock transformers model: before the weights arrive if the checkpoint is sparse, else
    after, from the dense weights. Made by `from_pretrained` and [`sparsify_`], kept as `model.hf_quantizer`.
    """

    quantization_config: DynSparseQuantizationConfig

    def __init__(self, quantization_config: DynSparseQuantizationConfig, pre_quantized: bool = True) -> None:
        # A copy: the layers of this model are written into it. Without any, it describes what to do to a dense model.
        super().__init__(
            copy.deepcopy(quantization_config),
            pre_quantized=pre_quantized and quantization_config.nnzb is not None,
        )
        self._source: str | None = None  # a model in memory comes from no checkpoint

    @property
    def is_trainable(self) -> bool:
        """Sparse layers train like dense ones."""
        return True

    @property
    def is_compileable(self) -> bool:
        """`torch.compile` sees an ordinary operator."""
        return True

    def is_serializable(self) -> bool:
        """Values and block indices are saved as they are."""
        return True

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        """Whether transformers is to take a tensor of any shape: those of sparse layers are checked afterwards."""
        owner = model.get_submodule(param_name.rpartition(".")[0])
        return self.pre_quantized and isinstance(owner, BlockSparseLinear)

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        if isinstance(model, DynSparseBertPreTrainedModel):
            raise ValueError(
                "`quantization_config` is for stock transformers models. Got a "
                f"{type(model).__name__}, whose own configuration says how sparse it is: pass `sparsity` and "
                "`block_size` to `from_pretrained` instead."
            )
        self._files = list(checkpoint_files or ())
        self._source = str(model.name_or_path) if self._files else GIVEN
        if self.pre_quantized:
            verify_weights(self._files)
            _replace_(model, present_layers(model, self.quantization_config.nnzb or {}), self.quantization_config)
            prefix = f"{model.base_model_prefix}."
            markers = "|".join(re.escape(name.removeprefix(prefix)) for name in sparse_layers(model))
            ours = {rf"(^|\.)({markers})\.weight$", *(rf"\.{name}$" for name in TRAINING_BUFFERS)}
            model._keys_to_ignore_on_load_unexpected = ours | set(model._keys_to_ignore_on_load_unexpected or ())

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        config = self.quantization_config
        if self._source is not None:
            if self.pre_quantized:
                _check_layers(model, config, self._source)
            check_loaded(model, self._source, self._files, saved_here=self.pre_quantized)
            warn_of_nonfinite(model, self._source)
        if not self.pre_quantized:
            if len(set(getattr(model, "hf_device_map", {}).values())) > 1:
                raise ValueError(
                    "A dense model must stand on one device to be made sparse. Got a `device_map` over several: load "
                    "it on one, save the sparse model, and spread that."
                )
            _replace_(model, config.nnzb or plan(model, config), config)
        self.settle(model)
        # The base class said yes: casts, compilation and training of all weights would then be refused.
        model.is_quantized = False
        # Conversions between old and new names of an architecture know dense weights only.
        self._dense_conversions = model.__dict__.get("_weight_conversions")
        model._weight_conversions = []
        model.register_load_state_dict_pre_hook(_drop_markers)
        write_readmes_(model)

    def attach_(self, model: Any) -> None:
        """Make a dense model in memory sparse, as if `from_pretrained` had done it."""
        model.hf_quantizer = self
        self.postprocess_model(model)

    def settle(self, model: PreTrainedModel) -> None:
        """
        Write the sparse layers of `model` as they are into the configuration.

        Raises:
            ValueError: if their blocks are not all of the configured size.
        """
        _check_one_block_size(model, self.quantization_config)
        self.quantization_config.nnzb = {name: layer.nnzb for name, layer in sparse_layers(model).items()}

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, torch.Tensor] | None, dict]:
        """What `save_pretrained` writes: the state of the model, and markers that stop who cannot read it."""
        if getattr(model, "_hf_peft_config_loaded", False):  # only an adapter is saved
            return None, {}
        if not sparse_layers(model):
            self.remove_quantization_config(model)
            return None, {}
        self.settle(model)
        # transformers without this package skips an unknown quantizer and draws the missing weights at random, with a
        # warning. An empty tensor in the place of each is a mismatch, which is an error.
        markers = {f"{name}.weight": torch.empty(0) for name in sparse_layers(model)}
        return with_checksums(model, {**model.state_dict(), **markers})

    def dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        """See [`densify_`]. `model.dequantize()` comes here; weights keep their dtype if none is given."""
        plain.densify_(model)
        self.remove_quantization_config(model)
        return model if dtype is None else model.to(dtype)

    def remove_quantization_config(self, model: Any) -> None:
        """Make `model` forget that it was sparse."""
        super().remove_quantization_config(model)
        separate_(model)
        del model._weight_conversions, model.save_pretrained
        if self._dense_conversions is not None:
            model._weight_conversions = self._dense_conversions


def sparsify_(
    model: nn.Module,
    block_size: int | tuple[int, int] = 16,
    sparsity: float = 0.9,
    *,
    distribution: str = "uniform",
    targets: Iterable[str] = ("*",),
    ignore: Iterable[str] | None = None,
) -> nn.Module:
    """
    Replace, in place, the dense linear layers of any model by sparse ones that keep their largest blocks (L1 norm).

    A transformers model then saves and loads as usual: `save_pretrained` writes active blocks only, and after
    `import hf_dynsparse` every class of the architecture reads them by `from_pretrained`, with the same head or
    another. Without this package loading fails with an error about mismatched shapes, unless
    `ignore_mismatched_sizes=True` asks for random weights. `from_config` does not look at sparsity and builds a dense
    model: sparsify that.

    Call it on the whole model; `targets` chooses parts. A second call adds layers, with blocks of the same size. In a
    DynSparse BERT only layers of the encoder can be chosen, and its own configuration says what they have become.

    Args:
        model (`nn.Module`): changed in place and returned.
        block_size (`int` or `tuple[int, int]`): side of a square block, or `(rows, columns)`.
        sparsity (`float`): share of inactive positions, in [0, 1).
        distribution (`str`): how the density is spread over the layers, `"uniform"` or `"erk"`.
        targets (`Iterable[str]`): shell-style patterns of module names.
        ignore (`Iterable[str]`, *optional*): patterns of layers that stay dense. By default in a transformers model
            all that is outside its base model (the head), poolers and embeddings; in another model
            `hf_dynsparse.nn.DENSE_PARTS`. Weights that two modules share are never replaced, nor are subclasses of
            `nn.Linear`.

    Raises:
        ValueError: if no layer matches, a block does not divide one of them, or the model is quantised already; the
            model is then untouched.

    Example:
        ```python
        >>> model = sparsify_(AutoModelForMaskedLM.from_pretrained("FacebookAI/roberta-base"), sparsity=0.9)
        >>> model.save_pretrained("sparse-roberta")
        >>> model = AutoModelForSequenceClassification.from_pretrained("sparse-roberta")
        ```
    """
    if not isinstance(model, PreTrainedModel):
        ignore = DENSE_PARTS if ignore is None else ignore
        return plain.sparsify_(model, block_size, sparsity, distribution=distribution, targets=targets, ignore=ignore)
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and not isinstance(quantizer, DynSparseQuantizer):
        raise ValueError(
            f"`sparsify_` needs weights in floating point. Got a {type(model).__name__} quantised by "
            f"{type(quantizer).__name__}. Load it without quantisation."
        )
    config = DynSparseQuantizationConfig(block_size, sparsity, distribution, targets, ignore)
    if isinstance(model, DynSparseBertPreTrainedModel):
        return _sparsify_bert_(model, config)
    _check_one_block_size(model, config)
    config.nnzb = plan(model, config)
    if quantizer is None:
        DynSparseQuantizer(config, pre_quantized=False).attach_(model)
    else:
        _replace_(model, config.nnzb, config)
        quantizer.quantization_config = model.config.quantization_config = config
        quantizer.settle(model)
    return model


def densify_(model: nn.Module) -> nn.Module:
    """
    Replace, in place, every sparse layer by a dense one with the same outputs; a transformers model is then a stock
    one again, and saves as such. Optimiser state must be made anew.

    Raises:
        ValueError: if the model has no sparse layer, or is quantised.
    """
    quantizer = vars(model).get("hf_quantizer")
    if quantizer is not None and not isinstance(quantizer, DynSparseQuantizer):
        raise ValueError(
            f"`densify_` needs weights in floating point. Got a {type(model).__name__} quantised by "
            f"{type(quantizer).__name__}. Call `model.dequantize()` first."
        )
    plain.densify_(model)
    for module in model.modules():  # the transformers model may stand inside another, such as PEFT's
        quantizer = vars(module).get("hf_quantizer")
        if isinstance(quantizer, DynSparseQuantizer):
            quantizer.remove_quantization_config(module)
    return model


def plan(model: PreTrainedModel, config: DynSparseQuantizationConfig) -> dict[str, int]:
    """
    The layers of `model` that `config` asks to be made sparse, and the active blocks of each.

    Raises:
        ValueError: if no layer matches, or a block does not divide one of them.
    """
    uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    # A subclass of a linear layer computes something of its own.
    linears: dict[str, Any] = {name: module for name, module in model.named_modules() if type(module) in SPARSE_TYPES}
    body, ignore = (body_modules(model), ()) if config.ignore is None else (linears, config.ignore)
    shapes = {
        name: _shape(linear)
        for name, linear in linears.items()
        if name in body
        and uses[id(linear.weight)] == 1
        and any(fnmatchcase(name, pattern) for pattern in config.targets)
        and not any(fnmatchcase(name, pattern) for pattern in ignore)
    }
    if not shapes:
        raise ValueError(
            f"At least one linear layer of {type(model).__name__} must be chosen. Got none for "
            f"targets={config.targets} and ignore={config.ignore}. Its linear layers: "
            f"{', '.join(list(linears)[:8]) or 'none'}. Change the patterns; `ignore=()` makes heads sparse too."
        )
    try:
        return active_blocks(shapes, config.sparsity, config.block_shape, config.distribution)
    except ValueError as error:
        raise ValueError(f"{error} Or leave layers out by `targets` or `ignore`.") from error


def _shape(linear: Any) -> tuple[int, int]:
    """`(out_features, in_features)`."""
    return (linear.nf, linear.nx) if isinstance(linear, Conv1D) else (linear.out_features, linear.in_features)


def present_layers(model: PreTrainedModel, layers: Mapping[str, About]) -> dict[str, About]:
    """`layers` by the names that they have in `model`: the loader's own rule for heads and bare models."""
    modules, prefix = dict(model.named_modules()), f"{model.base_model_prefix}."
    present = {}
    for name, about in layers.items():
        for alias in (name, name.removeprefix(prefix), prefix + name):
            if alias in modules:
                present[alias] = about
                break
    if not present:
        raise ValueError(
            f"`quantization_config` must name layers of {type(model).__name__}. Got none in {model.name_or_path}: it "
            f"names {', '.join(list(layers)[:3]) or 'nothing'}. Load a class of the architecture that was saved."
        )
    return present


def _check_one_block_size(model: nn.Module, config: DynSparseQuantizationConfig) -> None:
    for name, layer in sparse_layers(model).items():
        if layer.block_shape != config.block_shape:
            raise ValueError(
                "All sparse layers of a transformers model must have blocks of one size. Got "
                f"{config.block_shape} for a model with {layer.block_shape} in `{name}`. Use one `block_size`."
            )


def _replace_(model: PreTrainedModel, nnzb: Mapping[str, int], config: DynSparseQuantizationConfig) -> None:
    dense = {name: model.get_submodule(name) for name in nnzb}
    for name, count in nnzb.items():
        if type(dense[name]) not in SPARSE_TYPES:
            raise ValueError(f"`nnzb` must name linear layers. Got `{name}`, which is a {type(dense[name]).__name__}.")
        rows, columns = block_grid(_shape(dense[name]), config.block_shape, f"`{name}`")
        if not 1 <= count <= rows * columns:
            raise ValueError(f"`nnzb` of `{name}` must lie in [1, {rows * columns}]. Got {count}.")
    for name, linear in dense.items():
        sparse: Any = SPARSE_TYPES[type(linear)]
        model.set_submodule(name, sparse.from_dense(linear, config.block_shape, nnzb=nnzb[name]))


def _check_layers(model: PreTrainedModel, config: DynSparseQuantizationConfig, source: str) -> None:
    """
    Raises:
        ValueError: naming the first tensor of a sparse layer that the checkpoint does not hold, or not as it must be.
    """
    nnzb = present_layers(model, config.nnzb or {})
    for name, layer in sparse_layers(model).items():
        shapes = {"values": (nnzb[name], *layer.block_shape), "block_index": (nnzb[name],)}
        if layer.bias is not None:
            shapes["bias"] = (layer.out_features,)
        for leaf, shape in shapes.items():
            tensor = getattr(layer, leaf)
            if not is_loaded(tensor):
                raise ValueError(
                    f"A sparse checkpoint must hold every tensor of its sparse layers. Got {source} without "
                    f"`{name}.{leaf}`. Load an intact one; if its weights are dense, remove `quantization_config` "
                    "from its config.json."
                )
            if tuple(tensor.shape) != shape:
                raise ValueError(
                    f"`{name}.{leaf}` must have shape {shape}. Got {tuple(tensor.shape)} in {source}. Weights and "
                    "config.json belong to different models, or one of them is damaged: load an intact checkpoint."
                )
        if not layer.block_index.is_meta:
            layer.layout.validate(f"`{name}` in {source}")
    check_places(model, config.nnzb or {}, source)


def _drop_markers(model: nn.Module, state_dict: dict[str, torch.Tensor], prefix: str, *rest: Any) -> None:
    """Before `load_state_dict`, as when a run resumes: take out what `get_state_dict_and_metadata` put in."""
    for name in sparse_layers(model):
        marker = state_dict.get(f"{prefix}{name}.weight")
        if marker is not None and marker.numel() == 0:
            del state_dict[f"{prefix}{name}.weight"]


def _sparsify_bert_(model: Any, how: DynSparseQuantizationConfig) -> nn.Module:
    config, encoder = model.config, model.base_model.encoder
    nnzb, shapes = plan(model, how), encoder_shapes(config)
    inside = {name: name.rpartition("encoder.")[2] for name in nnzb}
    outside = [name for name, inner in inside.items() if inner not in shapes]
    if outside:
        raise ValueError(
            f"Only the encoder of a DynSparse BERT can be sparse. Got `{outside[0]}`: change `targets` or `ignore`."
        )
    _check_one_block_size(encoder, how)
    for name, count in nnzb.items():
        linear = cast(nn.Linear, model.get_submodule(name))
        model.set_submodule(name, BlockSparseLinear.from_dense(linear, how.block_shape, nnzb=count))
    config.block_size, config.sparsity, config.distribution, config.nnzb = (
        how.block_size,
        how.sparsity,
        how.distribution,
        None,
    )
    reached = {name: layer.nnzb for name, layer in sparse_layers(encoder).items()}
    if reached != config.nnzb_per_layer():
        config.nnzb = reached
        config.sparsity = 1.0 - config.num_active_entries() / sum(height * width for height, width in shapes.values())
    return model
