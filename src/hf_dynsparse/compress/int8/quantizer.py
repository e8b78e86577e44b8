"""Int8 models in transformers: `to_int8_`, and checkpoints that `from_pretrained` reads."""

import copy
import logging
import re
from collections.abc import Iterable, Mapping
from math import inf
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from ..._transformers import HfQuantizer, QuantizationConfigMixin, register_quantization_config, register_quantizer
from ...files import Kinds, check_object
from ...models.bert.modeling_dynsparse_bert import DynSparseBertPreTrainedModel
from ...models.checksums import separate_, verify_weights, warn_of_nonfinite, with_checksums
from ...models.completeness import GIVEN, check_loaded, check_places, is_loaded
from ...models.readme import write_readmes_
from ...models.stock.layers import present_layers
from ...nn.linear import BlockSparseLinear
from .embedding import Int8Embedding
from .index_coding import CODE_BITS
from .layers import Int8BlockSparseLinear, Int8Linear
from .qat import QatEmbedding, QatLinear, QuantizationAware


logger = logging.getLogger(__name__)

METHOD = "dynsparse_int8"
# What JSON must hold of a `DynSparseInt8Config`, and of a sparse layer in it.
KINDS: Kinds = {"layers": dict[str, dict[str, Any] | None], "embeddings": list[str]}
LAYER_KINDS: Kinds = {"block": list[int], "nnzb": int, "bits": int, "bytes": int}

INT8_TYPES = (Int8Linear, Int8BlockSparseLinear, Int8Embedding)

Int8Module = Int8Linear | Int8BlockSparseLinear | Int8Embedding


@register_quantization_config(METHOD)
class DynSparseInt8Config(QuantizationConfigMixin):
    """
    What is int8 in a model; `quantization_config` in its `config.json`, written by [`to_int8_`].

    Args:
        layers (`dict[str, dict | None]`): by module name the sparse layers, each with `block` (its sides), `nnzb` and
            `bits` and `bytes` of the code of its index; and the dense ones, with `None`.
        embeddings (`list[str]`): names of int8 embeddings.

    Raises:
        ValueError: for a layer described otherwise.
    """

    def __init__(
        self,
        layers: Mapping[str, Mapping[str, Any] | None],
        embeddings: Iterable[str] = (),
        quant_method: str = METHOD,
    ) -> None:
        self.quant_method = cast(Any, quant_method)
        self.layers = {name: None if about is None else dict(about) for name, about in layers.items()}
        self.embeddings = list(embeddings)
        for name, about in self.layers.items():
            if about is None:
                continue
            if about.keys() != {"block", "nnzb", "bits", "bytes"} or about["bits"] not in CODE_BITS:
                raise ValueError(
                    "`layers` must give block, nnzb, bits and bytes of a sparse layer, bits one of "
                    f"{', '.join(map(str, CODE_BITS))}. Got {about} for `{name}`. Load an intact checkpoint."
                )

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """
        As in transformers, from the entry of a `config.json`.

        Raises:
            ValueError: for a name or type that is none of ours too.
        """
        place = "`quantization_config`"
        layers = check_object(config_dict, place, KINDS).get("layers") or {}
        for name, about in layers.items():
            if about is not None:
                check_object(about, f"`{name}` in {place}", LAYER_KINDS)
        try:
            return super().from_dict(config_dict, *args, **kwargs)
        except TypeError as error:
            raise ValueError(f"{place} must be what {cls.__name__} takes. Got {error}.") from error

    def get(self, name: str, default: Any = None) -> Any:
        """As of a dictionary: transformers reads the configuration of a model in memory like one from a file."""
        return getattr(self, name, default)


@register_quantizer(METHOD)
class DynSparseInt8Quantizer(HfQuantizer):
    """
    Puts int8 layers into a model before its weights arrive. Made by `from_pretrained` and [`to_int8_`], kept as
    `model.hf_quantizer`.
    """

    quantization_config: DynSparseInt8Config
    requires_calibration = True  # ranges come from training: a model in floating point cannot be loaded as int8
    is_trainable = False

    def __init__(self, quantization_config: DynSparseInt8Config, pre_quantized: bool = True) -> None:
        super().__init__(copy.deepcopy(quantization_config), pre_quantized=pre_quantized)
        self._source: str | None = None

    def is_serializable(self) -> bool:
        """Int8 values, scales and coded indices are saved as they are."""
        return True

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """float32, whatever was asked for: integers are exact in it."""
        if dtype != torch.float32:
            logger.warning("An int8 model computes in float32. `dtype` %s is not looked at.", dtype)
        return torch.float32

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        self._files = list(checkpoint_files or ())
        self._source = str(model.name_or_path) if self._files else GIVEN
        if not isinstance(model, DynSparseBertPreTrainedModel):  # which looks by itself
            verify_weights(self._files)
        put_int8_layers_(model, self.quantization_config)
        prefix = f"{model.base_model_prefix}."
        markers = "|".join(re.escape(name.removeprefix(prefix)) for name in int8_modules(model))
        ignored = set(model._keys_to_ignore_on_load_unexpected or ())
        model._keys_to_ignore_on_load_unexpected = ignored | {rf"(^|\.)({markers})\.weight$"}

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        if self._source is not None:
            self._check_loaded(model, self._source)
        self.settle(model)
        model.is_quantized = False  # else transformers would refuse to evaluate it with a Trainer
        model._weight_conversions = []  # between old and new names of an architecture: they know dense weights only
        model.requires_grad_(False).eval()
        if not isinstance(model, DynSparseBertPreTrainedModel):
            write_readmes_(model)

    def _check_loaded(self, model: PreTrainedModel, source: str) -> None:
        modules = int8_modules(model)
        for name, module in modules.items():
            lost = [leaf for leaf, tensor in module.named_buffers() if not is_loaded(tensor)]
            if lost:
                raise ValueError(
                    f"An int8 checkpoint must hold every tensor of its int8 layers, in its shape. Got {source} and "
                    f"`{name}.{lost[0]}`, which fits to no tensor there. Load it with the configuration that it was "
                    "saved with."
                )
            if not module.scale.is_meta:
                _validate(name, module, source)
        warn_of_nonfinite(model, source)
        config = self.quantization_config
        check_places(model, [*config.layers, *config.embeddings], source)
        check_loaded(model, source, self._files)

    def settle(self, model: PreTrainedModel) -> None:
        """Write the int8 layers of `model` as they are into the configuration."""
        self.quantization_config = describe_int8_layers(model)
        model.config.quantization_config = self.quantization_config

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """What `save_pretrained` writes: the state of the model, and markers that stop who cannot read it."""
        self.settle(model)
        markers = {}
        if not isinstance(model, DynSparseBertPreTrainedModel):  # of an architecture that is known without us
            markers = {f"{name}.weight": torch.empty(0) for name in int8_modules(model)}
        return with_checksums(model, {**model.state_dict(), **markers})

    def dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        """
        A model in floating point with the weights that the integers represent, in place; its inputs are not rounded.
        `model.dequantize()` comes here. Sparse layers stay sparse in a DynSparse BERT; a stock model becomes dense.
        """
        keeps_sparse = isinstance(model, DynSparseBertPreTrainedModel)
        for name, module in int8_modules(model).items():
            layer: nn.Module = module.to_float()
            if isinstance(layer, BlockSparseLinear) and not keeps_sparse:
                layer = layer.to_linear()
            model.set_submodule(name, layer)
        self.remove_quantization_config(model)
        model.requires_grad_(True)
        return model if dtype is None else model.to(dtype)

    def remove_quantization_config(self, model: Any) -> None:
        """Make `model` forget that it was int8."""
        super().remove_quantization_config(model)
        separate_(model)
        vars(model).pop("_weight_conversions", None)
        vars(model).pop("save_pretrained", None)


def to_int8_(model: Any) -> Any:
    """
    Turn a model that was trained after [`prepare_qat_`] into an int8 model, in place. It computes with integers, by
    kernels for floating-point numbers in which no integer is rounded; it saves and loads as usual, and trains no more.

    Args:
        model (`PreTrainedModel`): changed in place and returned, in evaluation mode.

    Raises:
        ValueError: if it has no quantisation-aware layer, or one that has seen no batch in training.

    Example:
        ```python
        >>> to_int8_(model).save_pretrained("runs/sst2-int8")
        >>> model = AutoModelForSequenceClassification.from_pretrained("runs/sst2-int8")
        ```
    """
    aware = {name: layer for name, layer in model.named_modules() if isinstance(layer, QuantizationAware)}
    if not aware:
        raise ValueError(
            f"`to_int8_` must get a model in quantisation-aware training. Got a {type(model).__name__} without such "
            "layers: call `prepare_qat_` and train it."
        )
    for name, layer in aware.items():
        if not layer.is_ready:
            raise ValueError(
                f"Every layer must know the range of its inputs. Got `{name}`, which has seen no batch in training. "
                "Train the model, one step at least."
            )
    made: dict[str, nn.Module] = {name: _to_int8(layer) for name, layer in aware.items()}
    embeddings = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, QatEmbedding)]
    made |= {name: Int8Embedding.from_qat(layer) for name, layer in embeddings}
    if "hf_quantizer" in vars(model):  # of a sparse stock model
        model.hf_quantizer.remove_quantization_config(model)
    for name, module in made.items():
        model.set_submodule(name, module)
    model.hf_quantizer = DynSparseInt8Quantizer(describe_int8_layers(model))
    model.hf_quantizer.postprocess_model(model)
    return model


def int8_modules(model: nn.Module) -> dict[str, Int8Module]:
    """The int8 layers and embeddings of `model` by name, in module order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, INT8_TYPES)}


def describe_int8_layers(model: nn.Module) -> DynSparseInt8Config:
    """What is int8 in `model`."""
    modules = int8_modules(model)
    layers = {name: module for name, module in modules.items() if not isinstance(module, Int8Embedding)}
    return DynSparseInt8Config(
        {name: _describe(layer) for name, layer in layers.items()}, [name for name in modules if name not in layers]
    )


def put_int8_layers_(model: PreTrainedModel, config: DynSparseInt8Config) -> None:
    """
    Replace, in place, what `config` names by int8 layers on meta.

    Raises:
        ValueError: if nothing is there, or an embedding that an output layer shares.
    """
    for name, about in present_layers(model, {**config.layers, **dict.fromkeys(config.embeddings)}).items():
        module = model.get_submodule(name)
        if isinstance(module, nn.Embedding):
            if f"{name}.weight" in {*model.all_tied_weights_keys, *model.all_tied_weights_keys.values()}:
                raise ValueError(
                    f"An int8 embedding cannot be tied to an output layer. Got `{name}` of a {type(model).__name__}. "
                    "Load it with the head that it was saved with."
                )
            made: nn.Module = Int8Embedding(module.num_embeddings, module.embedding_dim, "meta")
        elif not isinstance(module, nn.Linear | BlockSparseLinear):
            raise ValueError(
                f"`layers` must name linear layers. Got `{name}`, which is a {type(module).__name__}. Load an intact "
                "checkpoint."
            )
        else:
            made = _empty_layer(module, about, f"`{name}` in {model.name_or_path}")
        model.set_submodule(name, made)


def _validate(name: str, module: Int8Module, source: str) -> None:
    """Check what no shape tells: scales, and the index."""
    for leaf in ("scale", "input_scale"):
        scale = module._buffers.get(leaf)
        if scale is not None and not 0.0 < float(scale) < inf:
            raise ValueError(
                f"`{name}.{leaf}` must be positive and finite. Got {float(scale)} in {source}. It is damaged: load an "
                "intact checkpoint."
            )
    if isinstance(module, Int8BlockSparseLinear):
        module.layout.validate(f"`{name}` in {source}")


def _empty_layer(linear: Any, about: Mapping[str, Any] | None, label: str) -> nn.Module:
    sides, bias = (linear.in_features, linear.out_features), linear.bias is not None
    if about is None:
        return Int8Linear(*sides, bias, "meta")
    block = tuple(about["block"])
    layer = Int8BlockSparseLinear(*sides, block, about["nnzb"], about["bits"], about["bytes"], bias, "meta")
    layer.label = label
    return layer


def _to_int8(layer: QuantizationAware) -> Int8Linear | Int8BlockSparseLinear:
    kind: Any = Int8Linear if isinstance(layer, QatLinear) else Int8BlockSparseLinear
    return kind.from_qat(layer)


def _describe(layer: Int8Module) -> dict[str, Any] | None:
    if not isinstance(layer, Int8BlockSparseLinear):
        return None
    size = layer.block_code.numel()
    return {"block": list(layer.block_shape), "nnzb": layer.nnzb, "bits": layer.code_bits, "bytes": size}
