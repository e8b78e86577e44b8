"""Dynamic block-sparse training of transformers: only the active blocks are stored, trained, saved and loaded."""

from .arguments import DynSparseTrainingArguments
from .callback import KernelCallback, TopologyCallback
from .flops import flops_per_sequence, inference_flops_per_sequence
from .layout import BlockLayout
from .memory import keep_freed_memory
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
from .nn import BlockSparseLinear, sparse_layers, topology_summary
from .ops import configure_kernels, use_backend
from .optim import group_lasso_, sparse_learning_rate
from .quantizer import DynSparseQuantizationConfig, densify_, sparsify_
from .seeded_dropout import seed_dropout_
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
    "DynSparseQuantizationConfig",
    "DynSparseTrainer",
    "DynSparseTrainingArguments",
    "KernelCallback",
    "TopologyCallback",
    "TopologyUpdater",
    "configure_kernels",
    "densify_",
    "flops_per_sequence",
    "group_lasso_",
    "inference_flops_per_sequence",
    "keep_freed_memory",
    "prune_regrow_",
    "seed_dropout_",
    "sparse_layers",
    "sparse_learning_rate",
    "sparsify_",
    "topology_summary",
    "use_backend",
]
