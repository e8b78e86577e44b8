"""
Sparse layers in any transformers architecture: `sparsify_`, `densify_`, and checkpoints that `from_pretrained` reads.

transformers lets a *quantizer* change the modules of a model before its weights arrive, and remembers it in
`config.json`. That is what serves here; nothing is quantised, and every weight keeps its dtype.
"""

import copy
import re
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import register_quantizer
from transformers.quantizers.base import HfQuantizer

from ... import nn as plain
from ...nn.linear import TRAINING_BUFFERS, BlockSparseLinear, sparse_layers
from ..bert.modeling_dynsparse_bert import DynSparseBertPreTrainedModel
from ..checksums import separate_, verify_weights, warn_of_nonfinite, with_checksums
from ..completeness import GIVEN, check_loaded, check_places, is_loaded
from ..readme import write_readmes_
from .configuration import METHOD, DynSparseQuantizationConfig
from .layers import _check_one_block_size, _replace_, plan, present_layers


@register_quantizer(METHOD)
class DynSparseQuantizer(HfQuantizer):
    """
    Puts sparse layers into a stock transformers model: before the weights arrive if the checkpoint is sparse, else
    after, from the dense weights. Made by `from_pretrained` and [`sparsify_`], kept as `model.hf_quantizer`.
    """

    quantization_config: DynSparseQuantizationConfig
    given_state: dict[str, torch.Tensor] | None = None  # while a model is saved: what to save in place of its own

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
        return with_checksums(model, {**(self.given_state or model.state_dict()), **markers})

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
