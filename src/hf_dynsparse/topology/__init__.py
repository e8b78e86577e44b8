"""The topology engine: scores, schedules, updates, exploration. Pure PyTorch; knows nothing of transformers."""

from .exploration import block_ages, dof_coverage, ever_active, track_exploration_
from .schedules import SCHEDULES, pruning_ratio_at, update_steps
from .scores import PRUNE_SCORES, REGROW_RULES, SCORES, BlockStatistics, Score
from .update import LayerUpdate, prune_regrow_
from .updater import TopologyReport, TopologyUpdater


__all__ = [
    "PRUNE_SCORES",
    "REGROW_RULES",
    "SCHEDULES",
    "SCORES",
    "BlockStatistics",
    "LayerUpdate",
    "Score",
    "TopologyReport",
    "TopologyUpdater",
    "block_ages",
    "dof_coverage",
    "ever_active",
    "prune_regrow_",
    "pruning_ratio_at",
    "track_exploration_",
    "update_steps",
]
