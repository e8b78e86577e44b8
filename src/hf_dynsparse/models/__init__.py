"""Model families, and their registration with the Auto classes."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForMultipleChoice,
    AutoModelForPreTraining,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from .bert.configuration_dynsparse_bert import DynSparseBertConfig
from .bert.modeling_dynsparse_bert import (
    DynSparseBertForMaskedLM,
    DynSparseBertForMultipleChoice,
    DynSparseBertForPreTraining,
    DynSparseBertForQuestionAnswering,
    DynSparseBertForSequenceClassification,
    DynSparseBertForTokenClassification,
    DynSparseBertModel,
)


AutoConfig.register("dynsparse_bert", DynSparseBertConfig)
AutoModel.register(DynSparseBertConfig, DynSparseBertModel)
AutoModelForMaskedLM.register(DynSparseBertConfig, DynSparseBertForMaskedLM)
AutoModelForMultipleChoice.register(DynSparseBertConfig, DynSparseBertForMultipleChoice)
AutoModelForPreTraining.register(DynSparseBertConfig, DynSparseBertForPreTraining)
AutoModelForQuestionAnswering.register(DynSparseBertConfig, DynSparseBertForQuestionAnswering)
AutoModelForSequenceClassification.register(DynSparseBertConfig, DynSparseBertForSequenceClassification)
AutoModelForTokenClassification.register(DynSparseBertConfig, DynSparseBertForTokenClassification)

__all__ = [
    "DynSparseBertConfig",
    "DynSparseBertForMaskedLM",
    "DynSparseBertForMultipleChoice",
    "DynSparseBertForPreTraining",
    "DynSparseBertForQuestionAnswering",
    "DynSparseBertForSequenceClassification",
    "DynSparseBertForTokenClassification",
    "DynSparseBertModel",
]
