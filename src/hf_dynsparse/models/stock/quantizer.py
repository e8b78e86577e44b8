"""
Models of transformers with other layers than their architecture has, through its quantizer interface.

transformers lets a *quantizer* change the modules of a model before its weights arrive, and remembers it in
`config.json`. `LayerQuantizer` is what sparse and int8 layers need of that. Sparse layers are not quantised: their
weights keep their dtype.
"""

import copy
import re
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel

from ..._transformers import HfQuantizer, register_quantizer
from ...blocks.sizes import block_grid
from ...nn.linear import TRAINING_BUFFER, BlockSparseLinear, layers_of, sparse_layers
from ...nn.replace import plan_blocks, replace_by_dense_, replace_by_sparse_
from ..bert.modeling_dynsparse_bert import DynSparseBertPreTrainedModel
from ..checksums import separate_, verify_weights, with_checksums
from ..heads import body_modules
from ..position_bias import check_stock, restore_position_bias_
from ..readme import write_readmes_
from ..verify import GIVEN, Report, held_after_loading, layers_without_place, verify, verify_values
from .configuration import METHOD, DynSparseQuantizationConfig, LayersConfig
from .layers import STOCK_TYPES


About = TypeVar("About")  # what is known of a layer


class LayerQuantizer(HfQuantizer):
    """
    Puts layers of this package into a model before its weights arrive, checks what has arrived, and saves them with
    checksums. Made by `from_pretrained` or for a model in memory, kept as `model.hf_quantizer`.
    """

    quantization_config: LayersConfig
    given_state: dict[str, torch.Tensor] | None = None  # while a model is saved: what to save in place of its own
    layer_types: tuple[type[nn.Module], ...]

    def __init__(self, quantization_config: LayersConfig, pre_quantized: bool = True) -> None:
        # A copy: the layers of this model are written into it.
        super().__init__(copy.deepcopy(quantization_config), pre_quantized=pre_quantized)
        self._source: str | None = None  # a model in memory comes from no checkpoint
        self._files: list[str] = []
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._dense_conversions: Any = None

    def layers(self, model: nn.Module) -> dict[str, Any]:
        """The layers of this package in `model`, by name."""
        modules = layers_of(model, nn.Module)
        return {name: module for name, module in modules.items() if isinstance(module, self.layer_types)}

    def put_layers_(self, model: PreTrainedModel) -> None:
        """Replace what the configuration names."""
        raise NotImplementedError

    def write_config(self, model: PreTrainedModel) -> None:
        """Write the layers of `model` as they are into the configuration."""
        raise NotImplementedError

    def restore_layers_(self, model: nn.Module) -> None:
        """Replace the layers of this package by those of the architecture."""
        raise NotImplementedError

    def is_serializable(self) -> bool:
        """All tensors of the layers are saved as they are."""
        return True

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        """Whether transformers is to take a tensor of any shape: those of our layers are checked afterwards."""
        return param_name in self._shapes

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        self._files = list(checkpoint_files or ())
        self._source = str(model.name_or_path) if self._files else GIVEN
        if not self.pre_quantized:
            return
        if not isinstance(model, DynSparseBertPreTrainedModel):  # which compares them itself
            verify_weights(self._files)
        self.put_layers_(model)
        layers, prefix = self.layers(model), f"{model.base_model_prefix}."
        self._shapes = {
            f"{name}.{leaf}": tuple(tensor.shape)
            for name, layer in layers.items()
            for leaf, tensor in layer.state_dict().items()
        }
        markers = "|".join(re.escape(name.removeprefix(prefix)) for name in layers)
        ours = {rf"(^|\.)({markers})\.weight$", TRAINING_BUFFER}
        model._keys_to_ignore_on_load_unexpected = ours | set(model._keys_to_ignore_on_load_unexpected or ())

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        if self._source is not None:
            self._verify(model, self._source)
        if not self.pre_quantized:
            self.put_layers_(model)
        self.write_config(model)
        # The base class said yes: casts, compilation, training and evaluation by a Trainer would then be refused.
        model.is_quantized = False
        # Conversions between old and new names of an architecture know dense weights only.
        self._dense_conversions = vars(model).get("_weight_conversions")
        model._weight_conversions = []
        if not isinstance(model, DynSparseBertPreTrainedModel):
            model.register_load_state_dict_pre_hook(_drop_markers)
            write_readmes_(model)
            restore_position_bias_(model)

    def _verify(self, model: PreTrainedModel, source: str) -> None:
        held = held_after_loading(model, source, self._files)
        if not held and source == GIVEN and not self._shapes:  # `state_dict={}` asks for a fresh model
            return
        saved_layers = self.quantization_config.named_layers if self.pre_quantized else ()
        unplaced = [(layer, source) for layer in layers_without_place(model, saved_layers)]
        verify(model, Report(source, held, self._shapes, self._shapes, unplaced, saved_here=self.pre_quantized))
        if not isinstance(model, DynSparseBertPreTrainedModel):  # which has looked at them
            verify_values(model, source)

    def attach_(self, model: Any) -> None:
        """Make a model in memory what `from_pretrained` would have made of it."""
        model.hf_quantizer = self
        self.postprocess_model(model)

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, torch.Tensor] | None, dict]:
        """What `save_pretrained` writes: the state of the model, its checksums, and empty tensors as markers."""
        if getattr(model, "_hf_peft_config_loaded", False):  # only an adapter is saved
            return None, {}
        if not self.layers(model):
            self.remove_quantization_config(model)
            return None, {}
        self.write_config(model)
        markers = {}
        if not isinstance(model, DynSparseBertPreTrainedModel):
            # transformers without this package skips an unknown quantizer and draws the missing weights at random,
            # with a warning. An empty tensor in the place of each is a mismatch, which is an error.
            markers = {f"{name}.weight": torch.empty(0) for name in self.layers(model)}
        return with_checksums(model, {**(self.given_state or model.state_dict()), **markers})

    def dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        """The model with layers in floating point, in place; `model.dequantize()` comes here."""
        if not isinstance(model, DynSparseBertPreTrainedModel):
            check_stock(model.config, "A model to become stock")
        self.restore_layers_(model)
        self.remove_quantization_config(model)
        return model if dtype is None else model.to(dtype)

    def remove_quantization_config(self, model: Any) -> None:
        """Make `model` forget that it had other layers."""
        super().remove_quantization_config(model)
        separate_(model)
        for name in ("_weight_conversions", "save_pretrained"):
            vars(model).pop(name, None)
        if self._dense_conversions is not None:
            model._weight_conversions = self._dense_conversions


@register_quantizer(METHOD)
class DynSparseQuantizer(LayerQuantizer):
    """
    Puts sparse layers into a stock transformers model: before the weights arrive if the checkpoint is sparse, else
    after, from the dense weights. Made by `from_pretrained` and [`sparsify_`].
    """

    quantization_config: DynSparseQuantizationConfig
    layer_types = (BlockSparseLinear,)

    def __init__(self, quantization_config: DynSparseQuantizationConfig, pre_quantized: bool = True) -> None:
        # Without layers by name the configuration says what to do to a dense model.
        super().__init__(quantization_config, pre_quantized and quantization_config.nnzb is not None)

    @property
    def is_trainable(self) -> bool:
        """Sparse layers train like dense ones."""
        return True

    @property
    def is_compileable(self) -> bool:
        """`torch.compile` sees an ordinary operator."""
        return True

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        if isinstance(model, DynSparseBertPreTrainedModel):
            raise ValueError(
                "`quantization_config` is for stock transformers models. Got a "
                f"{type(model).__name__}, whose own configuration says how sparse it is: pass `sparsity` and "
                "`block_size` to `from_pretrained` instead."
            )
        super()._process_model_before_weight_loading(model, checkpoint_files, **kwargs)

    def put_layers_(self, model: PreTrainedModel) -> None:
        """Replace dense layers: those that the configuration names or, if it names none, that its patterns choose."""
        config = self.quantization_config
        if self.pre_quantized:
            nnzb = present_layers(model, config.named_layers)
        elif len(set(getattr(model, "hf_device_map", {}).values())) > 1:
            raise ValueError(
                "A dense model must stand on one device to be made sparse. Got a `device_map` over several: load "
                "it on one, save the sparse model, and spread that."
            )
        else:
            nnzb = config.nnzb or plan_stock(model, config)
        _check_counts(model, nnzb, config.block_shape)
        replace_by_sparse_(model, nnzb, config.block_shape, STOCK_TYPES)

    def write_config(self, model: PreTrainedModel) -> None:
        """
        Write the active blocks of each layer into the configuration.

        Raises:
            ValueError: if their blocks are not all of the configured size.
        """
        check_one_block_size(model, self.quantization_config)
        self.quantization_config.nnzb = {name: layer.nnzb for name, layer in sparse_layers(model).items()}

    def restore_layers_(self, model: nn.Module) -> None:
        """See [`densify_`]."""
        replace_by_dense_(model)


def plan_stock(model: PreTrainedModel, config: DynSparseQuantizationConfig) -> dict[str, int]:
    """
    The layers of `model` that `config` asks to be made sparse, and the active blocks of each; see `plan_blocks`.

    Raises:
        ValueError: if no layer matches, or a block does not divide one of them.
    """
    body, ignore = (body_modules(model), ()) if config.ignore is None else (None, config.ignore)
    how = config.block_shape, config.sparsity, config.distribution, config.targets, ignore
    return plan_blocks(model, *how, among=body, types=STOCK_TYPES)


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


def check_one_block_size(model: nn.Module, config: DynSparseQuantizationConfig) -> None:
    """
    Raises:
        ValueError: naming a sparse layer of `model` with other blocks than `config` gives.
    """
    for name, layer in sparse_layers(model).items():
        if layer.block_shape != config.block_shape:
            raise ValueError(
                "All sparse layers of a transformers model must have blocks of one size. Got "
                f"{config.block_shape} for a model with {layer.block_shape} in `{name}`. Use one `block_size`."
            )


def _check_counts(model: PreTrainedModel, nnzb: Mapping[str, int], block_shape: tuple[int, int]) -> None:
    """Whether `nnzb` of a config.json fits: all of it is checked before anything is replaced."""
    for name, count in nnzb.items():
        dense: Any = model.get_submodule(name)
        if type(dense) not in STOCK_TYPES:
            raise ValueError(f"`nnzb` must name linear layers. Got `{name}`, which is a {type(dense).__name__}.")
        rows, columns = block_grid(STOCK_TYPES[type(dense)].dense_shape(dense), block_shape, f"`{name}`")
        if not 1 <= count <= rows * columns:
            raise ValueError(f"`nnzb` of `{name}` must lie in [1, {rows * columns}]. Got {count}.")


def _drop_markers(model: nn.Module, state_dict: dict[str, torch.Tensor], prefix: str, *rest: Any) -> None:
    """Before `load_state_dict`, as when a run resumes: take out what `get_state_dict_and_metadata` put in."""
    for name in sparse_layers(model):
        marker = state_dict.get(f"{prefix}{name}.weight")
        if marker is not None and marker.numel() == 0:
            del state_dict[f"{prefix}{name}.weight"]
