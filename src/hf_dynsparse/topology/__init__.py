"""The topology engine: scores, schedules, updates, exploration. Pure PyTorch; knows nothing of transformers."""

from .allocation import ALLOCATIONS
from .averaging import TopologyAverage
from .context import UpdateContext, choose_by_scores
from .exploration import block_ages, dof_coverage, ever_active
from .methods import METHODS, Method
from .records import track_, untrack_
from .registry import register_method, register_regrow_rule, register_score
from .report import TopologyReport
from .schedules import DENSITY_SCHEDULES, SCHEDULES, default_num_updates, density_share, pruning_ratio_at, update_steps
from .scores import PRUNE_SCORES, REGROW_RULES, SCORES, BlockStatistics, Score
from .settings import TopologyOptions, TopologySettings
from .update import LayerUpdate, Replacement, prune_regrow_
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
    "Replacement",
    "Score",
    "TopologyAverage",
    "TopologyOptions",
    "TopologyReport",
    "TopologySettings",
    "TopologyUpdater",
    "UpdateContext",
    "block_ages",
    "choose_by_scores",
    "default_num_updates",
    "density_share",
    "dof_coverage",
    "ever_active",
    "prune_regrow_",
    "pruning_ratio_at",
    "register_method",
    "register_regrow_rule",
    "register_score",
    "track_",
    "untrack_",
    "update_steps",
]
