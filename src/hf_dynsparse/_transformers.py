"""
The seam to transformers: what this package uses of it beyond its documented names at the top.

No other module imports from below `transformers`. The tables at the end name the private methods that classes of this
package override and the private attributes that they read or set. `tests/test_transformers.py` compares all of it with
the installed version, so that a new one that renames something fails there, by name.
"""

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

import transformers
from transformers import initialization as init
from transformers.activations import GELUActivation
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming, rename_source_key
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.modeling_outputs import MaskedLMOutput, QuestionAnsweringModelOutput
from transformers.modeling_utils import remove_tied_weights_from_state_dict, str_to_torch_dtype
from transformers.models.bert.modeling_bert import (
    BertEmbeddings,
    BertEncoder,
    BertForPreTrainingOutput,
    BertLayer,
    BertOnlyMLMHead,
    BertOutput,
    BertPooler,
    BertPreTrainingHeads,
    BertSelfOutput,
)
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.generic import can_return_tuple
from transformers.utils.hub import PushInProgress, cached_file, extract_commit_hash
from transformers.utils.quantization_config import QuantizationConfigMixin


if TYPE_CHECKING:
    from transformers.integrations.integration_utils import TensorBoardCallback, TrackioCallback
    from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
    from transformers.trainer_callback import ExportableState
    from transformers.trainer_utils import (
        PREFIX_CHECKPOINT_DIR,
        EvalLoopOutput,
        HubStrategy,
        SaveStrategy,
        TrainOutput,
        get_last_checkpoint,
        has_length,
    )
    from transformers.training_args import OptimizerNames


__all__ = [
    "CONFIG_NAME",
    "OPTIMIZER_NAME",
    "PREFIX_CHECKPOINT_DIR",
    "SAFE_WEIGHTS_INDEX_NAME",
    "SAFE_WEIGHTS_NAME",
    "SCHEDULER_NAME",
    "TRAINER_STATE_NAME",
    "BertEmbeddings",
    "BertEncoder",
    "BertForPreTrainingOutput",
    "BertLayer",
    "BertOnlyMLMHead",
    "BertOutput",
    "BertPooler",
    "BertPreTrainingHeads",
    "BertSelfOutput",
    "ConversionOps",
    "EvalLoopOutput",
    "ExportableState",
    "GELUActivation",
    "HfQuantizer",
    "HubStrategy",
    "MaskedLMOutput",
    "OptimizerNames",
    "PushInProgress",
    "QuantizationConfigMixin",
    "QuestionAnsweringModelOutput",
    "SaveStrategy",
    "TensorBoardCallback",
    "TrackioCallback",
    "TrainOutput",
    "WeightConverter",
    "WeightRenaming",
    "cached_file",
    "can_return_tuple",
    "extract_commit_hash",
    "get_last_checkpoint",
    "has_length",
    "init",
    "register_quantization_config",
    "register_quantizer",
    "remove_tied_weights_from_state_dict",
    "rename_source_key",
    "sdpa_attention_forward",
    "sdpa_mask",
    "str_to_torch_dtype",
]

logger = logging.getLogger(__name__)

# Minor versions: the oldest that has all of this, as setup.py asks for, and the newest that the suite has passed with.
OLDEST, NEWEST_TESTED = (5, 23), (5, 24)

# Private methods that classes of this package override: the class in transformers, and the parameters of its method.
OVERRIDDEN = {
    "transformers.PreTrainedModel": {
        "_init_weights": "self, module",
        "_load_pretrained_model": "model, state_dict, checkpoint_files, load_config, expected_keys",
    },
    "transformers.quantizers.base.HfQuantizer": {
        "_process_model_before_weight_loading": "self, model, **kwargs",
        "_process_model_after_weight_loading": "self, model, **kwargs",
    },
    "transformers.Trainer": {
        "_determine_best_metric": "self, metrics, trial",
        "_finish_current_push": "self",
        "_get_grad_norm": "self, model, grad_norm",
        "_init_training_state": (
            "self, max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial"
        ),
        "_issue_warnings_after_load": "self, load_result",
        "_load_best_model": "self",
        "_load_from_checkpoint": "self, resume_from_checkpoint, model",
        "_load_optimizer_and_scheduler": "self, checkpoint",
        "_prepare_for_training": "self, max_steps, train_dataloader, resume_from_checkpoint",
        "_push_from_checkpoint": "self, checkpoint_folder",
        "_save": "self, output_dir, state_dict",
        "_save_checkpoint": "self, model, trial",
        "_save_optimizer_and_scheduler": "self, output_dir",
    },
}

# Private attributes that this package reads or sets, and the module of transformers that gives them their meaning.
TOUCHED = {
    "_attn_implementation": "configuration_utils",
    "_auto_class": "modeling_utils",
    "_created_lr_scheduler": "trainer",
    "_eval_dataloaders": "trainer",
    "_get_output_dir": "trainer",
    "_hf_peft_config_loaded": "integrations.peft",
    "_is_hf_initialized": "initialization",
    "_keys_to_ignore_on_load_missing": "modeling_utils",
    "_keys_to_ignore_on_load_unexpected": "modeling_utils",
    "_keys_to_ignore_on_save": "modeling_utils",
    "_model_mapping": "models.auto.auto_factory",
    "_move_model_to_device": "trainer",
    "_no_split_modules": "modeling_utils",
    "_save_rng_state": "trainer",
    "_save_scaler": "trainer",
    "_tied_weights_keys": "modeling_utils",
    "_trackio": "integrations.integration_utils",
    "_weight_conversions": "core_model_loading",
}

# Where the names of training live. They are imported when first asked for, the Trainer last: a model needs none.
_OF_TRAINING = ("trainer_utils", "trainer_callback", "training_args", "integrations.integration_utils", "trainer")


def __getattr__(name: str) -> Any:
    if name in __all__:
        for module in map(import_module, (f"transformers.{module}" for module in _OF_TRAINING)):
            if hasattr(module, name):
                return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def check_version(installed: str = transformers.__version__) -> None:
    """
    Raises:
        ImportError: for a version of transformers that is too old. One above the newest tested is worth a warning.
    """
    minor = tuple(int(part) for part in installed.split(".")[:2])
    oldest, newest, next_one = (
        f"{major}.{number}" for major, number in (OLDEST, NEWEST_TESTED, (NEWEST_TESTED[0], NEWEST_TESTED[1] + 1))
    )
    if minor < OLDEST:
        raise ImportError(
            f"hf_dynsparse needs transformers {oldest} or newer. Got {installed}. Install another: "
            f"pip install 'transformers>={oldest},<6'."
        )
    if minor > NEWEST_TESTED:
        logger.warning(
            f"hf_dynsparse is tested with transformers {oldest} to {newest}. Got {installed}: if loading, saving or "
            f"training fails, install a tested one: pip install 'transformers>={oldest},<{next_one}'."
        )


check_version()
