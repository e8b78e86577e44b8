"""LoRA on sparse layers: frozen active blocks, and a dense low-rank adapter beside them. Needs the package `peft`."""

from typing import Any

import torch
from peft import LoraConfig
from peft.tuners import lora
from transformers import Conv1D

from ..nn.linear import BlockSparseLinear


# The others look at the dense weight, which a sparse layer does not have.
INITIALISATIONS = (True, False, "gaussian")


class BlockSparseLora(lora.Linear):
    """A LoRA adapter on a [`BlockSparseLinear`]; PEFT makes it where a registered configuration targets one."""

    def __init__(self, base_layer: Any, adapter_name: str, config: LoraConfig, **kwargs: Any) -> None:
        super().__init__(base_layer, adapter_name, config, **kwargs)
        self.fan_in_fan_out = False  # of GPT-2, whose weights are transposed: our sparse layers are not

    @property
    def lora_variants(self) -> dict[tuple[str, ...], Any]:
        """Plain LoRA only: variants such as DoRA look at the dense weight."""
        return {(): None}

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs: Any) -> None:
        """See PEFT; refuses an initialisation that needs the dense weight."""
        if config.init_lora_weights not in INITIALISATIONS:
            raise ValueError(
                f"`init_lora_weights` must be one of {INITIALISATIONS} on a sparse layer. Got "
                f"{config.init_lora_weights!r}, which decomposes a dense weight. Choose True."
            )
        super().update_layer(adapter_name, r, lora_alpha, config, **kwargs)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """
        Add the adapter to the base weight: possible once `densify_` has made it dense.

        Raises:
            ValueError: while it is sparse.
        """
        base = self.get_base_layer()
        if isinstance(base, BlockSparseLinear):
            raise ValueError(
                "Merging needs a dense weight: a low-rank update does not fit into active blocks. Got a sparse layer "
                f"{base}. Keep the adapter beside it, or call `densify_(model)` before merging."
            )
        self.fan_in_fan_out = isinstance(base, Conv1D)
        super().merge(safe_merge, adapter_names)

    def _get_in_out_features(self, module: Any) -> tuple[int, int]:
        return module.in_features, module.out_features

    def _get_base_layer_device_and_dtype(self, base_layer: Any) -> tuple[torch.device, torch.dtype]:
        weight = base_layer.values if isinstance(base_layer, BlockSparseLinear) else base_layer.weight
        return weight.device, weight.dtype


def register_lora(config: LoraConfig) -> LoraConfig:
    """
    Let `config` target sparse layers, beside all that PEFT targets itself; to be called before it is used. PEFT does
    not save this: register again to load an adapter.

    Args:
        config (`peft.LoraConfig`): changed in place and returned. `target_modules` names the layers as usual,
            `target_modules=list(sparse_layers(model))` all sparse ones.

    Raises:
        ValueError: for `target_modules="all-linear"`, by which PEFT does not find sparse layers.

    Example:
        ```python
        >>> config = register_lora(LoraConfig(r=8, target_modules=["query", "value"]))
        >>> model = get_peft_model(sparse_model, config)
        >>> model.save_pretrained("adapter")

        >>> config = register_lora(LoraConfig.from_pretrained("adapter"))
        >>> model = PeftModel.from_pretrained(sparse_model, "adapter", config=config)
        ```
    """
    if isinstance(config.target_modules, str) and config.target_modules.lower() == "all-linear":
        raise ValueError(
            '`target_modules` must name the layers. Got "all-linear", by which PEFT finds dense ones only. Give '
            "`list(sparse_layers(model))`, or the ends of their names."
        )
    config._register_custom_module({BlockSparseLinear: BlockSparseLora})
    return config
