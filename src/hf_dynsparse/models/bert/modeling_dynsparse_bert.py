"""BERT with a block-sparse encoder: the stock forward passes over an encoder that is never allocated dense."""

import inspect
import logging
import re
from collections.abc import Callable
from functools import wraps
from typing import Any, Self

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    BertForMaskedLM,
    BertForMultipleChoice,
    BertForPreTraining,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    BertPreTrainedModel,
    PreTrainedModel,
)

from ..._transformers import (
    BertEmbeddings,
    BertEncoder,
    BertForPreTrainingOutput,
    BertOnlyMLMHead,
    BertPooler,
    BertPreTrainingHeads,
    MaskedLMOutput,
    QuestionAnsweringModelOutput,
    can_return_tuple,
    init,
)
from ...blocks.layout import BlockLayout
from ...blocks.sizes import BlockSize, check_sparsity
from ...nn.linear import (
    INITIAL_TOPOLOGIES,
    SEARCH_GATES,
    SPARSE_INITS,
    TRAINING_BUFFER,
    BlockSparseLinear,
    sparse_layers,
)
from ...nn.replace import replace_by_sparse_
from ..calibrated import calibrate_
from ..checksums import ChecksumWriter, order_metadata
from ..loading import check_readable, count_nonzero_blocks, load_whole, refuse_pickles
from ..losses import IGNORED, RowLosses, span_loss, token_loss, zero_if_unlabelled
from ..position_bias import PositionBias, add_position_bias_, check_stock
from ..readme import write_readme
from .configuration_dynsparse_bert import DynSparseBertConfig, encoder_shapes, layer_sizes


logger = logging.getLogger(__name__)


class DynSparseBertPreTrainedModel(BertPreTrainedModel):
    """Initialisation, loading, saving, import and export shared by all DynSparse BERT models."""

    config: DynSparseBertConfig
    # Inherited losses are means over a batch, although their forward takes any argument: the Trainer must be told.
    accepts_loss_kwargs = False
    _keys_to_ignore_on_load_unexpected = [TRAINING_BUFFER, rf"\.{SEARCH_GATES}$"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, BlockSparseLinear):
            # Only these initialisers leave alone what a checkpoint has already filled.
            std = self.config.initializer_range
            index = INITIAL_TOPOLOGIES[self.config.initial_topology](module.grid, module.nnzb, None)
            init.copy_(module.block_index, index)
            init.trunc_normal_(module.values, mean=0.0, std=std, a=-2 * std, b=2 * std)
            if (scale := SPARSE_INITS[self.config.sparse_init]) is not None:
                by_slot = scale(BlockLayout(index, module.shape, module.block_shape))
                init.copy_(module.values, module.values * by_slot.to(module.values))
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, PositionBias):
            module.reset_()
        else:
            super()._init_weights(module)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """
        As in transformers, from a DynSparse BERT or a dense BERT, in a folder or on the Hub.

        Of a dense checkpoint every encoder matrix keeps its blocks of largest L1 norm, ties to the lower id, as many
        as the configuration says: `sparsity`, `block_size` and `distribution` are arguments like any other of the
        configuration.

        With `calibration`, batches of token ids or a [`Calibration`], blocks are kept by what they do to those inputs
        instead, and what is kept is fitted to the outputs of the dense model; see [`sparsify_`].

        No model is half random: a checkpoint must hold every tensor of the embeddings and the encoder. Heads and
        poolers may be missing, or with `ignore_mismatched_sizes=True` have other shapes, and then start afresh.

        Raises:
            ValueError: naming tensor and file, if a tensor is missing, of another shape or not what was saved, a block
                index is not int32, out of range or repeated, or a file cannot be read or is a pickle.

        Example:
            ```python
            >>> model = DynSparseBertForMaskedLM.from_pretrained("bert-base-uncased", sparsity=0.9, block_size=16)
            ```
        """
        if kwargs.get("calibration") is not None:
            return cls._from_pruned(pretrained_model_name_or_path, *args, **kwargs)
        kwargs.pop("calibration", None)
        kwargs = refuse_pickles(pretrained_model_name_or_path, **kwargs)
        try:
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        except SafetensorError:  # before `load_whole` looks: transformers says nothing about the file
            check_readable(pretrained_model_name_or_path)
            raise

    @classmethod
    def _from_pruned(cls, name_or_path: Any, *args: Any, calibration: Any, **kwargs: Any) -> Any:
        """A dense checkpoint, loaded dense and then pruned by `calibration`."""
        given = kwargs.pop("config", None)
        if given is None:
            sparsity, nnzb = kwargs.pop("sparsity", DynSparseBertConfig.sparsity), None
            model = cls.from_pretrained(name_or_path, *args, sparsity=0.0, **kwargs)
        elif isinstance(given, DynSparseBertConfig):
            sparsity, nnzb = given.sparsity, given.nnzb
            dense = DynSparseBertConfig.from_stock(given, sparsity=0.0, nnzb=None)
            model = cls.from_pretrained(name_or_path, *args, config=dense, **kwargs)
        else:
            raise ValueError(
                "`calibration` prunes a dense checkpoint to the `sparsity` and `block_size` that are given beside it, "
                f"or by a DynSparseBertConfig. Got {given} as `config`. Give one of these instead."
            )
        config, encoder = model.config, "encoder." if model.base_model is model else "bert.encoder."
        config.sparsity, config.nnzb = check_sparsity(sparsity), nnzb
        nnzb = {f"{encoder}{name}": count for name, count in config.nnzb_per_layer().items()}
        shapes = {f"{encoder}{name}": shape for name, shape in config.block_shapes().items()}
        kept = calibrate_(model, nnzb, shapes, calibration)
        for shape in set(shapes.values()):
            replace_by_sparse_(model, {name: count for name, count in kept.items() if shapes[name] == shape}, shape)
        if kept != nnzb:
            config.set_nnzb({name.removeprefix(encoder): count for name, count in kept.items()})
        return model

    @staticmethod
    def _load_pretrained_model(
        model: Any, state_dict: Any, checkpoint_files: Any, load_config: Any, expected_keys: Any = None
    ) -> Any:
        stock_load = BertPreTrainedModel._load_pretrained_model
        # Expected keys are an adapter's, which comes on top of a loaded model; nothing at all asks for a fresh one.
        if expected_keys is not None or state_dict == {}:
            return stock_load(model, state_dict, checkpoint_files, load_config, expected_keys)
        return load_whole(stock_load, model, state_dict, checkpoint_files, load_config)

    @classmethod
    def from_dense(cls, model: PreTrainedModel, config: DynSparseBertConfig) -> Self:
        """
        A sparse copy of a stock BERT in memory: every encoder matrix keeps its blocks of largest L1 norm, ties to the
        lower id. A head that `model` does not have starts afresh. Nothing is shared with `model`.

        Args:
            model (`PreTrainedModel`): of the stock class with the same head, or a [`~transformers.BertModel`].
            config (`DynSparseBertConfig`): of the same dimensions, such as `DynSparseBertConfig.from_stock(...)`.

        Raises:
            ValueError: naming the first tensor that has other dimensions in `config`.

        Example:
            ```python
            >>> config = DynSparseBertConfig.from_stock(bert.config, sparsity=0.9, block_size=16)
            >>> model = DynSparseBertForMaskedLM.from_dense(bert, config)
            ```
        """
        # Copies: a loaded model takes over the very tensors that it is given.
        state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        sparse: Any = cls.from_pretrained(None, config=config, state_dict=state, dtype=model.dtype)
        return sparse.to(model.device).train(model.training)

    @classmethod
    def from_nonzeros(cls, name_or_path_or_model: Any, block_size: BlockSize = 1, **kwargs: Any) -> Self:
        """
        A sparse copy of a dense BERT that was pruned: it has the active blocks which hold an entry other than zero,
        layer by layer, and the same outputs. `config.nnzb` says how many.

        An encoder matrix stays dense if less than 1 % of its entries are zero, or if no block of it is. Embeddings,
        pooler and heads stay dense, with the zeros that they have.

        Args:
            name_or_path_or_model (`str`, `os.PathLike` or `PreTrainedModel`): a checkpoint, or a model in memory.
            block_size (`int`, `tuple[int, int]` or `dict`, defaults to 1): that of the pruning; 1 if it was
                unstructured.
            kwargs: for a checkpoint: passed to `from_pretrained`, such as `num_labels`.

        Raises:
            ValueError: if there is no zero block in any layer, or the checkpoint is refused by `from_pretrained`.

        Example:
            ```python
            >>> name = "Intel/bert-base-uncased-sparse-90-unstructured-pruneofa"
            >>> model = DynSparseBertForMaskedLM.from_nonzeros(name)
            ```
        """
        dense = name_or_path_or_model
        if not isinstance(dense, PreTrainedModel):
            dense = cls.from_pretrained(dense, sparsity=0.0, **kwargs)
        elif kwargs:
            raise ValueError(
                f"Only a checkpoint takes arguments of `from_pretrained`. Got a model and {', '.join(kwargs)}. Leave "
                "them out."
            )
        config = DynSparseBertConfig.from_stock(dense.config, sparsity=0.0, block_size=block_size, nnzb=None)
        encoder = dense.base_model.encoder
        weights = {name: encoder.get_submodule(name).weight for name in encoder_shapes(config)}
        nnzb = count_nonzero_blocks(weights, config.block_shapes())
        if not nnzb:
            sizes = sorted(set(config.block_shapes().values()))
            raise ValueError(
                "`from_nonzeros` must find zero blocks of "
                f"{', '.join(f'{rows} x {columns}' for rows, columns in sizes)}. Got none in the encoder of "
                f"{dense.name_or_path or type(dense).__name__}. Give a smaller `block_size`, or prune here: "
                "`from_pretrained(..., sparsity=0.9)`."
            )
        config.set_nnzb(nnzb)
        logger.info("%d of %d layers are sparse; sparsity %.4f.", len(nnzb), len(weights), config.sparsity)
        return cls.from_dense(dense, config)

    def save_pretrained(
        self, save_directory: Any, is_main_process: bool = True, state_dict: Any = None, *args: Any, **kwargs: Any
    ) -> None:
        """
        As in transformers: values and block indices travel as they are, with their checksums, and a short README.md,
        unless there is one, says what to install. A densified model says so in its config.
        """
        if not sparse_layers(self):
            self.config.sparsity, self.config.nnzb = 0.0, None
        if self._auto_class is None:  # loaded from a repository with code, which does not come along
            vars(self.config).pop("auto_map", None)
        # Of an adapter nothing else is saved; an int8 model has a quantiser of its own, which stays.
        writes_checksums = not self._hf_peft_config_loaded and "hf_quantizer" not in vars(self)
        if writes_checksums:
            self.hf_quantizer = ChecksumWriter(self.state_dict() if state_dict is None else state_dict)
        try:
            super().save_pretrained(save_directory, is_main_process, state_dict, *args, **kwargs)
            if is_main_process:
                order_metadata(save_directory)
                if not self._hf_peft_config_loaded:
                    write_readme(self, save_directory)
        finally:
            if writes_checksums:
                del self.hf_quantizer

    @torch.no_grad()
    def to_dense(self) -> BertPreTrainedModel:
        """
        A copy as the stock transformers class, e.g. [`~transformers.BertForMaskedLM`], with the same outputs.

        Layers with fewer heads or neurons than `num_attention_heads` and `intermediate_size` get zero rows and columns
        for those that they lack, after their own: stock classes know layers of one size only.

        Raises:
            ValueError: if the weights are int8, or there is a distance bias, which stock classes leave out.
        """
        check_stock(self.config, "A model to become stock")
        if "hf_quantizer" in vars(self):
            raise ValueError("`to_dense` needs weights in floating point. Got int8: call `model.dequantize()` first.")
        stock = type(self).__mro__[2]
        # Built on meta and filled: the dense weights exist once.
        with torch.device("meta"):
            dense: BertPreTrainedModel = stock(self.config.to_stock())
        ours = rf"{TRAINING_BUFFER}|\bposition_bias\."
        state = {key: tensor for key, tensor in self.state_dict().items() if not re.search(ours, key)}
        for name, layer in sparse_layers(self).items():
            for key in [key for key in state if key.startswith(f"{name}.") and not key.endswith(".bias")]:
                del state[key]
            state[f"{name}.weight"] = layer.to_dense()
        sizes = {key: tensor.shape for key, tensor in dense.state_dict().items()}
        dense.load_state_dict({key: _padded(tensor, sizes[key]) for key, tensor in state.items()}, assign=True)
        # Buffers that no checkpoint holds are still on meta.
        for name, buffer in self.named_buffers():
            module, _, leaf = name.rpartition(".")
            if module.endswith("embeddings"):
                dense.get_submodule(module).register_buffer(leaf, buffer.clone(), persistent=False)
        dense.tie_weights()
        return dense.train(self.training)


class DynSparseBertModel(DynSparseBertPreTrainedModel, BertModel):
    """
    The encoder, outputting raw hidden states; see [`~transformers.BertModel`] for inputs and outputs.

    Args:
        config (`DynSparseBertConfig`): the model's configuration.
        add_pooling_layer (`bool`, defaults to `True`): whether to add the dense pooler.
    """

    def __init__(self, config: DynSparseBertConfig, add_pooling_layer: bool = True) -> None:
        BertPreTrainedModel.__init__(self, config)
        self.gradient_checkpointing = False
        self.embeddings = BertEmbeddings(config)
        self.encoder = _build_encoder(config)
        self.pooler = BertPooler(config) if add_pooling_layer else None
        if config.position_bias is not None:
            add_position_bias_(self, config.position_bias, config.position_bias_strength)
        self.post_init()


class DynSparseBertForMaskedLM(DynSparseBertPreTrainedModel, BertForMaskedLM):
    """
    Masked language modelling; see [`~transformers.BertForMaskedLM`].

    While training with `config.sparse_prediction`, `logits` hold the masked positions only: shape
    `(masked_positions, vocab_size)`, in reading order. Otherwise `(batch_size, sequence_length, vocab_size)`.
    """

    sparse_evaluation = False  # the same while evaluating: see `predicting_labelled`
    row_losses: RowLosses | None = None  # while training: see `fuse_passes_`
    # This forward divides by `num_items_in_batch` itself.
    accepts_loss_kwargs = True

    def __init__(self, config: DynSparseBertConfig) -> None:
        BertPreTrainedModel.__init__(self, config)
        _trace_masked_positions(config)
        self.bert = DynSparseBertModel(config, add_pooling_layer=False)
        self.cls = BertOnlyMLMHead(config)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> MaskedLMOutput | tuple[torch.Tensor, ...]:
        """
        `labels` of shape `(batch_size, sequence_length)`: token ids at masked positions, -100 elsewhere. The loss is
        their mean, or their sum over `num_items_in_batch` if given: the masked positions of all micro-batches and
        ranks, so that splitting a batch changes nothing.
        """
        outputs = self.bert(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, return_dict=True, **kwargs
        )
        hidden_states = outputs.last_hidden_state
        hidden_states, labels = _to_predict(self, hidden_states, labels)
        logits, row_losses = self.cls(hidden_states), self.row_losses if self.training else None
        output = MaskedLMOutput(
            loss=None if labels is None else token_loss(logits, labels, num_items_in_batch, row_losses),
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
        return output.to_tuple() if return_dict is False else output


class DynSparseBertForPreTraining(DynSparseBertPreTrainedModel, BertForPreTraining):
    """
    Masked language modelling and next sentence prediction; see [`~transformers.BertForPreTraining`].

    While training with `config.sparse_prediction`, `prediction_logits` hold the masked positions only.
    """

    sparse_evaluation = False
    row_losses: RowLosses | None = None

    def __init__(self, config: DynSparseBertConfig) -> None:
        BertPreTrainedModel.__init__(self, config)
        _trace_masked_positions(config)
        self.bert = DynSparseBertModel(config)
        self.cls = BertPreTrainingHeads(config)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        next_sentence_label: torch.Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> BertForPreTrainingOutput | tuple[torch.Tensor, ...]:
        """
        `labels` of shape `(batch_size, sequence_length)` as in masked language modelling, `next_sentence_label` of
        shape `(batch_size,)`: 0 if the second segment continues the first, 1 if it is a random one.
        """
        outputs = self.bert(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, return_dict=True, **kwargs
        )
        hidden_states, loss = outputs.last_hidden_state, None
        if next_sentence_label is None:
            labels = None  # the loss is that of both heads, or none
        hidden_states, labels = _to_predict(self, hidden_states, labels)
        prediction_logits, relationship_logits = self.cls(hidden_states, outputs.pooler_output)
        if labels is not None and next_sentence_label is not None:
            loss = token_loss(prediction_logits, labels, row_losses=self.row_losses if self.training else None)
            loss = loss + token_loss(relationship_logits, next_sentence_label)
        output = BertForPreTrainingOutput(
            loss=loss,
            prediction_logits=prediction_logits,
            seq_relationship_logits=relationship_logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
        return output.to_tuple() if return_dict is False else output


def _zero_without_labels(forward: Callable[..., Any]) -> Any:
    """`forward` of a stock head; its loss is 0 where no label of the batch counts, as in `hf_dynsparse.losses`."""
    names = list(inspect.signature(forward).parameters)

    @wraps(forward)  # the Trainer reads the names of the arguments
    @can_return_tuple
    def with_zero(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **{**kwargs, "return_dict": True})
        labels = {**dict(zip(names, args, strict=False)), **kwargs}.get("labels")
        if labels is not None and not labels.is_floating_point():
            output.loss = zero_if_unlabelled(output.loss, labels)
        return output

    return with_zero


class DynSparseBertForSequenceClassification(DynSparseBertPreTrainedModel, BertForSequenceClassification):
    """Classification or regression of a sequence; see [`~transformers.BertForSequenceClassification`]."""

    def __init__(self, config: DynSparseBertConfig) -> None:
        _init_classifier(self, config, config.num_labels or 2)

    forward = _zero_without_labels(BertForSequenceClassification.forward)


class DynSparseBertForTokenClassification(DynSparseBertPreTrainedModel, BertForTokenClassification):
    """Classification of each token; see [`~transformers.BertForTokenClassification`]."""

    def __init__(self, config: DynSparseBertConfig) -> None:
        _init_classifier(self, config, config.num_labels or 2, add_pooling_layer=False)

    forward = _zero_without_labels(BertForTokenClassification.forward)


class DynSparseBertForQuestionAnswering(DynSparseBertPreTrainedModel, BertForQuestionAnswering):
    """Extractive question answering; see [`~transformers.BertForQuestionAnswering`]."""

    def __init__(self, config: DynSparseBertConfig) -> None:
        BertPreTrainedModel.__init__(self, config)
        self.num_labels: int = config.num_labels or 2
        self.bert = DynSparseBertModel(config, add_pooling_layer=False)
        self.qa_outputs = nn.Linear(config.hidden_size, self.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        start_positions: torch.Tensor | None = None,
        end_positions: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> QuestionAnsweringModelOutput:
        """
        `start_positions` and `end_positions` of shape `(batch_size,)`: tokens where answers begin and end; those
        outside of the sequence do not count.
        """
        output = super().forward(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, **{**kwargs, "return_dict": True}
        )
        if start_positions is None or end_positions is None:
            return output
        loss = span_loss(output.start_logits, start_positions) + span_loss(output.end_logits, end_positions)
        return QuestionAnsweringModelOutput(loss=loss / 2, **output)


class DynSparseBertForMultipleChoice(DynSparseBertPreTrainedModel, BertForMultipleChoice):
    """Choice among several continuations; see [`~transformers.BertForMultipleChoice`]."""

    def __init__(self, config: DynSparseBertConfig) -> None:
        _init_classifier(self, config, 1)

    forward = _zero_without_labels(BertForMultipleChoice.forward)


def _build_encoder(config: DynSparseBertConfig) -> BertEncoder:
    device = torch.get_default_device()
    # Dense shapes on meta cost nothing: the dense encoder is never allocated.
    with torch.device("meta"):
        encoder: Any = BertEncoder(config)
        for layer, (heads, _) in zip(encoder.layer, layer_sizes(config), strict=True):
            attention = layer.attention.self
            attention.num_attention_heads, attention.all_head_size = heads, heads * attention.attention_head_size
        shapes, blocks = encoder_shapes(config), config.block_shapes()
        linears: dict[str, nn.Module] = {name: nn.Linear(columns, rows) for name, (rows, columns) in shapes.items()}
        for name, nnzb in config.nnzb_per_layer().items():
            rows, columns = shapes[name]
            linears[name] = BlockSparseLinear(columns, rows, blocks[name], nnzb=nnzb)
        for name, linear in linears.items():
            encoder.set_submodule(name, linear)
    built: BertEncoder = encoder if device.type == "meta" else encoder.to_empty(device=device)
    return built


def _padded(tensor: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """A copy of `tensor` of `shape`, with zeros at the end of every side that is shorter."""
    missing = [side - given for side, given in zip(shape, tensor.shape, strict=True)]
    return nn.functional.pad(tensor, [pad for side in reversed(missing) for pad in (0, side)])


def _trace_masked_positions(config: DynSparseBertConfig) -> None:
    """
    Let `torch.compile` trace a number of positions that depends on the data: it breaks the graph there by default.
    """
    if config.sparse_prediction:
        torch._dynamo.config.capture_dynamic_output_shape_ops = True


def _init_classifier(model: Any, config: DynSparseBertConfig, outputs: int, add_pooling_layer: bool = True) -> None:
    """The constructor of a stock classifier of so many outputs, around a sparse encoder."""
    BertPreTrainedModel.__init__(model, config)
    model.num_labels = config.num_labels or 2
    model.bert = DynSparseBertModel(config, add_pooling_layer)
    dropout = config.hidden_dropout_prob if config.classifier_dropout is None else config.classifier_dropout
    model.dropout = nn.Dropout(dropout)
    model.classifier = nn.Linear(config.hidden_size, outputs)
    model.post_init()


def _to_predict(
    model: DynSparseBertForMaskedLM | DynSparseBertForPreTraining,
    hidden_states: torch.Tensor,
    labels: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """
    With `sparse_prediction`, while training or with `sparse_evaluation`: hidden states `(masked, hidden_size)` and
    labels `(masked,)` at the positions to predict, in reading order; else all.
    """
    if labels is None or not (model.config.sparse_prediction and (model.training or model.sparse_evaluation)):
        return hidden_states, labels
    labels = labels.reshape(-1)  # [batch * sequence]
    masked = (labels != IGNORED).nonzero().squeeze(1)
    return hidden_states.reshape(-1, hidden_states.shape[-1])[masked], labels[masked]
