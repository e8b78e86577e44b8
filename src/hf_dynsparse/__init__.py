"""Dynamic block-sparse training of transformers: only the active blocks are stored, trained, saved and loaded."""

from .blocks.layout import BlockLayout
from .checkpoints.export import export_bsr, export_dense, export_onnx, export_program, read_bsr, sparsify_checkpoint
from .checkpoints.inspection import inspect_checkpoint
from .checkpoints.remote_code import save_with_code
from .compress.int8 import prepare_qat_, to_int8_
from .compress.slimming import Ticket, draw_ticket
from .compress.slimming.slim import slim
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
from .models.dropout import seed_dropout_
from .models.flops import flops_per_sequence, inference_flops_per_sequence
from .models.sparsify import densify_, sparsify_
from .models.stock.configuration import DynSparseQuantizationConfig
from .nn.linear import BlockSparseLinear, sparse_layers
from .ops import Backend, configure_kernels, register_backend, use_backend
from .optim.block_adam import BlockAdamW
from .optim.groups import parameter_groups, sparse_learning_rate
from .optim.lasso import group_lasso_
from .reports.estimate import estimate_run
from .reports.layers import topology_summary
from .reports.model_card import write_model_card
from .topology import METHODS, TopologyAverage, TopologyUpdater, prune_regrow_
from .training.arguments import DynSparseTrainingArguments
from .training.callbacks.history import TopologyHistory
from .training.callbacks.kernels import KernelCallback
from .training.callbacks.slimming import EarlyBirdCallback
from .training.callbacks.topology import TopologyCallback
from .training.memory import keep_freed_memory
from .training.trainer import DynSparseTrainer


__version__ = "0.1.0"

__all__ = [
    "METHODS",
    "Backend",
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
    "register_backend",
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
