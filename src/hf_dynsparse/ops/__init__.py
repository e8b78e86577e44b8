"""
Products with a block-sparse matrix: a shipped reference, the backends tested against it, and the choice among them.
"""

from .backends import BACKENDS, Backend, choose_backend, use_backend
from .operators import block_sparse_linear, observe_sdd
from .reference import take_blocks, to_dense


__all__ = [
    "BACKENDS",
    "Backend",
    "block_sparse_linear",
    "choose_backend",
    "observe_sdd",
    "take_blocks",
    "to_dense",
    "use_backend",
]
