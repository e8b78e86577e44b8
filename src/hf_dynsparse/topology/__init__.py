"""The topology engine: scores, schedules, updates, exploration. Pure PyTorch; knows nothing of transformers."""

from .allocation import ALLOCATIONS
from .averaging import TopologyAverage
from .exploration import block_ages, dof_coverage, ever_active, track_exploration_
from .report import TopologyReport
from .schedules import DENSITY_SCHEDULES, SCHEDULES, default_num_updates, density_share, pruning_ratio_at, update_steps
from .scores import PRUNE_SCORES, REGROW_RULES, SCORES, BlockStatistics, Score
from .settings import METHODS, Method, TopologySettings, method_settings
from .update import LayerUpdate, prune_regrow_
from .updater import TopologyUpdater


__all__ = [
    "ALLOCATIONS",
    "DENSITY_SCHEDULES",
    "METHODS",
    "PRUNE_SCORES",
    "REGROW_RULES",
    "SCHEDULES",
    "SCORES",
    "BlockStatistics",
    "LayerUpdate",
    "Method",
    "Score",
    "TopologyAverage",
    "TopologyReport",
    "TopologySettings",
    "TopologyUpdater",
    "block_ages",
    "default_num_updates",
    "density_share",
    "dof_coverage",
    "ever_active",
    "method_settings",
    "prune_regrow_",
    "pruning_ratio_at",
    "track_exploration_",
    "update_steps",
]
