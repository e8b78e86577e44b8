"""Dynamic block-sparse training of transformers: only the active blocks are stored, trained, saved and loaded."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

# These register DynSparse BERT and both quantizers with the Auto classes, and what exported programs may call.
# All else is imported when it is first used.
from .compress.int8 import quantizer as _int8_quantizer  # noqa: F401
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
from .models.stock import quantizer as _stock_quantizer  # noqa: F401
from .models.stock.configuration import DynSparseQuantizationConfig
from .ops import dropout as _dropout_operator  # noqa: F401


if TYPE_CHECKING:
    from .blocks.layout import BlockLayout
    from .calibration.settings import Calibration
    from .checkpoints.export import (
        export_bsr,
        export_dense,
        export_onnx,
        export_program,
        read_bsr,
        sparsify_checkpoint,
    )
    from .checkpoints.remote_code import save_with_code
    from .compress.int8 import prepare_qat_, to_int8_
    from .compress.slimming import Ticket, draw_ticket
    from .compress.slimming.slim import slim
    from .models.dropout import seed_dropout_
    from .models.flops import flops_per_sequence, inference_flops_per_sequence
    from .models.fresh import sparse_from_config
    from .models.passes import fuse_passes_
    from .models.sparsify import densify_, sparsify_
    from .nn.linear import BlockSparseLinear, sparse_layers
    from .ops import Backend, configure_kernels, register_backend, use_backend
    from .optim.block_adam import BlockAdamW
    from .optim.groups import parameter_groups, sparse_learning_rate
    from .optim.lasso import group_lasso_
    from .reports.estimate import estimate_run
    from .reports.inspection import inspect_checkpoint
    from .reports.layers import topology_summary
    from .reports.model_card import write_model_card
    from .topology import (
        METHODS,
        TopologyAverage,
        TopologyUpdater,
        prune_regrow_,
        register_method,
        register_regrow_rule,
        register_score,
    )
    from .training.arguments import DynSparseTrainingArguments
    from .training.callbacks.history import TopologyHistory
    from .training.callbacks.kernels import KernelCallback
    from .training.callbacks.slimming import EarlyBirdCallback
    from .training.callbacks.topology import TopologyCallback
    from .training.memory import keep_freed_memory
    from .training.trainer import DynSparseTrainer


__version__ = "0.1.0"

# Where the names are that are imported when they are first used: as above, for Python instead of type checkers.
_MODULES = {
    ".blocks.layout": "BlockLayout",
    ".calibration.settings": "Calibration",
    ".checkpoints.export": "export_bsr export_dense export_onnx export_program read_bsr sparsify_checkpoint",
    ".checkpoints.remote_code": "save_with_code",
    ".compress.int8": "prepare_qat_ to_int8_",
    ".compress.slimming": "Ticket draw_ticket",
    ".compress.slimming.slim": "slim",
    ".models.dropout": "seed_dropout_",
    ".models.flops": "flops_per_sequence inference_flops_per_sequence",
    ".models.fresh": "sparse_from_config",
    ".models.passes": "fuse_passes_",
    ".models.sparsify": "densify_ sparsify_",
    ".nn.linear": "BlockSparseLinear sparse_layers",
    ".ops": "Backend configure_kernels register_backend use_backend",
    ".optim.block_adam": "BlockAdamW",
    ".optim.groups": "parameter_groups sparse_learning_rate",
    ".optim.lasso": "group_lasso_",
    ".reports.estimate": "estimate_run",
    ".reports.inspection": "inspect_checkpoint",
    ".reports.layers": "topology_summary",
    ".reports.model_card": "write_model_card",
    ".topology": (
        "METHODS TopologyAverage TopologyUpdater prune_regrow_ register_method register_regrow_rule register_score"
    ),
    ".training.arguments": "DynSparseTrainingArguments",
    ".training.callbacks.history": "TopologyHistory",
    ".training.callbacks.kernels": "KernelCallback",
    ".training.callbacks.slimming": "EarlyBirdCallback",
    ".training.callbacks.topology": "TopologyCallback",
    ".training.memory": "keep_freed_memory",
    ".training.trainer": "DynSparseTrainer",
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names.split()}
_ROOMS = ("checkpoints", "data", "hub", "ops", "optim", "reports", "topology", "training")

__all__ = [
    "METHODS",
    "Backend",
    "BlockAdamW",
    "BlockLayout",
    "BlockSparseLinear",
    "Calibration",
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
    "fuse_passes_",
    "group_lasso_",
    "inference_flops_per_sequence",
    "inspect_checkpoint",
    "keep_freed_memory",
    "parameter_groups",
    "prepare_qat_",
    "prune_regrow_",
    "read_bsr",
    "register_backend",
    "register_method",
    "register_regrow_rule",
    "register_score",
    "save_with_code",
    "seed_dropout_",
    "slim",
    "sparse_from_config",
    "sparse_layers",
    "sparse_learning_rate",
    "sparsify_",
    "sparsify_checkpoint",
    "to_int8_",
    "topology_summary",
    "use_backend",
    "write_model_card",
]


if not TYPE_CHECKING:  # type checkers would take it for a promise of any name

    def __getattr__(name: str) -> Any:
        """Import a public name, or a folder of the package, when it is first used."""
        if name in _ROOMS:
            return import_module(f".{name}", __name__)
        if name not in _MODULE_OF:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = globals()[name] = getattr(import_module(_MODULE_OF[name], __name__), name)
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__, *_ROOMS})
