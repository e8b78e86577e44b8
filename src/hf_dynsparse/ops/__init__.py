"""
Products with a block-sparse matrix: a shipped reference, the backends tested against it, and the choice among them.
"""

from .autograd import block_sparse_linear
from .backends import BACKENDS, Backend, register_backend
from .choice import KernelPlan, choose_backend, configure_kernels, describe_choice, use_backend
from .operators import observe_weight_gradient
from .problem import Problem
from .reference import take_blocks, to_dense


__all__ = [
    "BACKENDS",
    "Backend",
    "KernelPlan",
    "Problem",
    "block_sparse_linear",
    "choose_backend",
    "configure_kernels",
    "describe_choice",
    "observe_weight_gradient",
    "register_backend",
    "take_blocks",
    "to_dense",
    "use_backend",
]
