"""Dynamic block-sparse training of transformers: only the active blocks are stored, trained, saved and loaded."""

from .arguments import DynSparseTrainingArguments
from .block_adam import BlockAdamW
from .callback import TopologyCallback
from .early_bird import EarlyBirdCallback, Ticket, draw_ticket
from .estimate import estimate_run
from .export import export_bsr, export_dense, export_onnx, export_program, read_bsr, sparsify_checkpoint
from .flops import flops_per_sequence, inference_flops_per_sequence
from .inspection import inspect_checkpoint
from .int8 import prepare_qat_, to_int8_
from .kernel_callback import KernelCallback
from .layout import BlockLayout
from .memory import keep_freed_memory
from .model_card import write_model_card
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
from .optim import group_lasso_, parameter_groups, sparse_learning_rate
from .quantizer import DynSparseQuantizationConfig, densify_, sparsify_
from .remote_code import save_with_code
from .seeded_dropout import seed_dropout_
from .slimming import slim
from .topology import METHODS, TopologyAverage, TopologyUpdater, prune_regrow_
from .topology_history import TopologyHistory
from .trainer import DynSparseTrainer


__version__ = "0.1.0"

__all__ = [
    "METHODS",
    "BlockAdamW",
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
    "EarlyBirdCallback",
    "KernelCallback",
    "Ticket",
    "TopologyAverage",
    "TopologyCallback",
    "TopologyHistory",
    "TopologyUpdater",
    "configure_kernels",
    "densify_",
    "draw_ticket",
    "estimate_run",
    "export_bsr",
    "export_dense",
    "export_onnx",
    "export_program",
    "flops_per_sequence",
    "group_lasso_",
    "inference_flops_per_sequence",
    "inspect_checkpoint",
    "keep_freed_memory",
    "parameter_groups",
    "prepare_qat_",
    "prune_regrow_",
    "read_bsr",
    "save_with_code",
    "seed_dropout_",
    "slim",
    "sparse_layers",
    "sparse_learning_rate",
    "sparsify_",
    "sparsify_checkpoint",
    "to_int8_",
    "topology_summary",
    "use_backend",
    "write_model_card",
]
