"""Any architecture of transformers with sparse linear layers, through its quantizer interface."""

from .configuration import DynSparseQuantizationConfig
from .quantizer import DynSparseQuantizer


__all__ = ["DynSparseQuantizationConfig", "DynSparseQuantizer"]
