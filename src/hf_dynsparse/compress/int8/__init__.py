"""Int8 models: quantisation-aware training, and storage as int8 values, scales and a compact block index."""

from .embedding import Int8Embedding
from .layers import Int8BlockSparseLinear, Int8Linear
from .qat import prepare_qat_
from .quantizer import DynSparseInt8Config, to_int8_
from .reference import integer_reference


__all__ = [
    "DynSparseInt8Config",
    "Int8BlockSparseLinear",
    "Int8Embedding",
    "Int8Linear",
    "integer_reference",
    "prepare_qat_",
    "to_int8_",
]
