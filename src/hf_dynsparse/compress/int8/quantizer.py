"""Int8 models in transformers: `to_int8_`, and checkpoints that `from_pretrained` reads."""

import logging
from collections.abc import Iterable, Mapping
from math import inf
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from ..._transformers import register_quantization_config, register_quantizer
from ...files import Kinds, check_object
from ...models.bert.modeling_dynsparse_bert import DynSparseBertPreTrainedModel
from ...models.stock.configuration import LayersConfig
from ...models.stock.quantizer import LayerQuantizer, present_layers
from ...nn.linear import BlockSparseLinear
from .bert import fuse_
from .embedding import Int8Embedding
from .index_coding import CODE_BITS
from .layers import Int8BlockSparseLinear, Int8Linear
from .qat import QatBlockSparseLinear, QatEmbedding, QatLinear, QuantizationAware


logger = logging.getLogger(__name__)

METHOD = "dynsparse_int8"
# What JSON must hold of a sparse layer.
LAYER_KINDS: Kinds = {"block": list[int], "nnzb": int, "bits": int, "bytes": int}

INT8_TYPES = (Int8Linear, Int8BlockSparseLinear, Int8Embedding)

Int8Module = Int8Linear | Int8BlockSparseLinear | Int8Embedding


@register_quantization_config(METHOD)
class DynSparseInt8Config(LayersConfig):
    """
    What is int8 in a model; `quantization_config` in its `config.json`, written by [`to_int8_`].

    Args:
        layers (`dict[str, dict | None]`): by module name the sparse layers, each with `block` (its sides), `nnzb` and
            `bits` and `bytes` of the code of its index; and the dense ones, with `None`.
        embeddings (`list[str]`): names of int8 embeddings.

    Raises:
        ValueError: for a layer described otherwise.
    """

    kinds = {"layers": dict[str, dict[str, Any] | None], "embeddings": list[str]}

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
    def check(cls, saved: dict[str, Any]) -> None:
        """See [`LayersConfig`]."""
        super().check(saved)
        for name, about in (saved.get("layers") or {}).items():
            if about is not None:
                check_object(about, f"`{name}` in `quantization_config`", LAYER_KINDS)

    @property
    def named_layers(self) -> dict[str, Any]:
        """What is said of each layer; nothing of embeddings."""
        return {**self.layers, **dict.fromkeys(self.embeddings)}


@register_quantizer(METHOD)
class DynSparseInt8Quantizer(LayerQuantizer):
    """Puts int8 layers into a model before its weights arrive. Made by `from_pretrained` and [`to_int8_`]."""

    quantization_config: DynSparseInt8Config
    layer_types = INT8_TYPES
    requires_calibration = True  # ranges come from training: a model in floating point cannot be loaded as int8
    is_trainable = False

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """float32, whatever was asked for: integers are exact in it."""
        if dtype != torch.float32:
            logger.warning("An int8 model computes in float32. `dtype` %s is not looked at.", dtype)
        return torch.float32

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        super()._process_model_after_weight_loading(model, **kwargs)
        model.requires_grad_(False).eval()
        fuse_(model, True)

    def _verify(self, model: PreTrainedModel, source: str) -> None:
        super()._verify(model, source)
        for name, module in int8_modules(model).items():
            for leaf in ("scale", "input_scale"):
                scale = module._buffers.get(leaf)
                if scale is not None and not scale.is_meta and not 0.0 < float(scale) < inf:
                    raise ValueError(
                        f"`{name}.{leaf}` must be positive and finite. Got {float(scale)} in {source}. It is damaged: "
                        "load an intact checkpoint."
                    )

    def put_layers_(self, model: PreTrainedModel) -> None:
        """See `put_int8_layers_`."""
        put_int8_layers_(model, self.quantization_config)

    def write_config(self, model: PreTrainedModel) -> None:
        """Write the int8 layers of `model` as they are into the configuration."""
        self.quantization_config = describe_int8_layers(model)
        model.config.quantization_config = self.quantization_config

    def restore_layers_(self, model: nn.Module) -> None:
        """
        Give `model` the weights that the integers represent; its inputs are not rounded. Sparse layers stay sparse in
        a DynSparse BERT; a stock model becomes dense.
        """
        keeps_sparse = isinstance(model, DynSparseBertPreTrainedModel)
        fuse_(model, False)
        for name, module in int8_modules(model).items():
            layer: nn.Module = module.to_float()
            if isinstance(layer, BlockSparseLinear) and not keeps_sparse:
                layer = layer.to_linear()
            model.set_submodule(name, layer)
        model.requires_grad_(True)


def to_int8_(model: Any) -> Any:
    """
    Turn a model that was trained after [`prepare_qat_`] into an int8 model, in place. It computes with integers, by
    kernels for them on a CPU with AVX2 or more; it saves and loads as usual, and trains no more.

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
    kinds: dict[type[nn.Module], Any] = {
        QatLinear: Int8Linear,
        QatBlockSparseLinear: Int8BlockSparseLinear,
        QatEmbedding: Int8Embedding,
    }
    made = {
        name: int8.from_qat(layer)
        for name, layer in model.named_modules()
        for kind, int8 in kinds.items()
        if isinstance(layer, kind)
    }
    if "hf_quantizer" in vars(model):  # of a sparse stock model
        model.hf_quantizer.remove_quantization_config(model)
    for name, module in made.items():
        model.set_submodule(name, module)
    DynSparseInt8Quantizer(describe_int8_layers(model)).attach_(model)
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
    for name, about in present_layers(model, config.named_layers).items():
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


def _empty_layer(linear: Any, about: Mapping[str, Any] | None, label: str) -> nn.Module:
    sides, bias = (linear.in_features, linear.out_features), linear.bias is not None
    if about is None:
        return Int8Linear(*sides, bias, "meta")
    block = tuple(about["block"])
    layer = Int8BlockSparseLinear(*sides, block, about["nnzb"], about["bits"], about["bytes"], bias, "meta")
    layer.label = label
    return layer


def _describe(layer: Int8Module) -> dict[str, Any] | None:
    if not isinstance(layer, Int8BlockSparseLinear):
        return None
    size = layer.block_code.numel()
    return {"block": list(layer.block_shape), "nnzb": layer.nnzb, "bits": layer.code_bits, "bytes": size}
