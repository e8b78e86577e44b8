"""Dynamic block-sparse training of transformers: only the active blocks are stored, trained, saved and loaded."""

from .arguments import DynSparseTrainingArguments
from .callback import TopologyCallback
from .flops import flops_per_sequence, inference_flops_per_sequence
from .layout import BlockLayout
from .models import (
    DynSparseBertConfig,
    DynSparseBertForMaskedLM,
    DynSparseBertForMultipleChoice,
    DynSparseBertForPreTraining,
    DynSparseBertForQuestionAnswering,
    DynSparseBertForSequenceClassification,
    DynSparseBertForTokenClassification,
    DynSparseBertModel,
)
from .nn import BlockSparseLinear, densify_, sparse_layers, sparsify_, topology_summary
from .ops import choose_backend, use_backend
from .optim import group_lasso_, sparse_learning_rate
from .topology import TopologyUpdater, prune_regrow_
from .trainer import DynSparseTrainer


__version__ = "0.1.0"

__all__ = [
    "BlockLayout",
    "BlockSparseLinear",
    "DynSparseBertConfig",
    "DynSparseBertForMaskedLM",
    "DynSparseBertForMultipleChoice",
    "DynSparseBertForPreTraining",
    "DynSparseBertForQuestionAnswering",
    "DynSparseBertForSequenceClassification",
    "DynSparseBertForTokenClassification",
    "DynSparseBertModel",
    "DynSparseTrainer",
    "DynSparseTrainingArguments",
    "TopologyCallback",
    "TopologyUpdater",
    "choose_backend",
    "densify_",
    "flops_per_sequence",
    "group_lasso_",
    "inference_flops_per_sequence",
    "prune_regrow_",
    "sparse_layers",
    "sparse_learning_rate",
    "sparsify_",
    "topology_summary",
    "use_backend",
]
