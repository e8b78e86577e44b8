"""`Int8Embedding`."""

from typing import final

import torch
from torch import nn

from .affine import quantize_weight, weight_scale
from .qat import QatEmbedding


@final
class Int8Embedding(nn.Module):
    """An embedding of `int8_values` of shape `(num_embeddings, embedding_dim)` with one `scale`."""

    int8_values: torch.Tensor
    scale: torch.Tensor

    def __init__(self, num_embeddings: int, embedding_dim: int, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        shape = num_embeddings, embedding_dim
        self.register_buffer("int8_values", torch.empty(shape, dtype=torch.int8, device=device))
        self.register_buffer("scale", torch.empty((), dtype=torch.float32, device=device))
        self._is_hf_initialized = True
        self.eval()

    @classmethod
    @torch.no_grad()
    def from_qat(cls, layer: QatEmbedding) -> "Int8Embedding":
        """The embedding that `layer` has been trained to be."""
        made = cls(layer.num_embeddings, layer.embedding_dim, layer.weight.device)
        made.scale.copy_(weight_scale(layer.weight))
        if not bool(made.scale.isfinite()):
            raise ValueError(
                "The vectors of an int8 embedding must be finite. Got NaN or infinity among them. Train again from an "
                "intact checkpoint."
            )
        made.int8_values.copy_(quantize_weight(layer.weight, made.scale))
        return made

    @property
    def weight(self) -> torch.Tensor:
        """The int8 values, for code that asks for shape, device or dtype."""
        return self.int8_values

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Ids of any shape to float32 of shape `(..., embedding_dim)`."""
        return nn.functional.embedding(input, self.int8_values) * self.scale

    @torch.no_grad()
    def to_float(self) -> nn.Embedding:
        """An ordinary embedding with the same outputs."""
        weight = self.int8_values * self.scale
        return nn.Embedding(self.num_embeddings, self.embedding_dim, _weight=weight).train(self.training)
