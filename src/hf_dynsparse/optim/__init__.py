"""What optimisers need to know of blocks: moments, groups, group lasso, ages."""

from .block_adam import BlockAdamW
from .groups import parameter_groups, sparse_learning_rate
from .lasso import group_lasso_


__all__ = ["BlockAdamW", "group_lasso_", "parameter_groups", "sparse_learning_rate"]
