"""`sparsify_` and `densify_`, for models of transformers and any other `nn.Module`."""

from collections.abc import Iterable
from typing import Any, cast

from torch import nn
from transformers import PreTrainedModel

from ..blocks.sizes import as_block_shape
from ..calibration import Batch, Calibration
from ..nn.replace import DENSE_PARTS, plan_blocks, replace_by_dense_, replace_by_sparse_
from .bert.configuration_dynsparse_bert import encoder_shapes
from .bert.modeling_dynsparse_bert import DynSparseBertPreTrainedModel
from .calibrated import calibrate_
from .density import tell_config_
from .position_bias import check_stock
from .stock.configuration import DynSparseQuantizationConfig
from .stock.quantizer import DynSparseQuantizer, check_one_block_size, plan_stock


def sparsify_(
    model: nn.Module,
    block_size: int | tuple[int, int] = 16,
    sparsity: float = 0.9,
    *,
    distribution: str = "uniform",
    targets: Iterable[str] = ("*",),
    ignore: Iterable[str] | None = None,
    calibration: Calibration | Iterable[Batch] | None = None,
) -> nn.Module:
    """
    Replace, in place, the dense linear layers of any model by sparse ones that keep their largest blocks (L1 norm) or,
    with `calibration`, those that matter most to its outputs.

    A transformers model then saves and loads as usual: `save_pretrained` writes active blocks only, and after
    `import hf_dynsparse` every class of the architecture reads them by `from_pretrained`, with the same head or
    another. Without this package loading fails with an error about mismatched shapes, unless
    `ignore_mismatched_sizes=True` asks for random weights. `from_config` does not look at sparsity and builds a dense
    model: [`sparse_from_config`] builds a sparse one.

    Call it on the whole model; `targets` chooses parts. A second call adds layers, with blocks of the same size. In a
    DynSparse BERT only layers of the encoder can be chosen, and its own configuration says what they have become.

    Args:
        model (`nn.Module`): changed in place and returned.
        block_size (`int` or `tuple[int, int]`): side of a square block, or `(rows, columns)`.
        sparsity (`float`): share of inactive positions, in [0, 1).
        distribution (`str`): how the density is spread over the layers, `"uniform"` or `"erk"`.
        targets (`Iterable[str]`): shell-style patterns of module names.
        ignore (`Iterable[str]`, *optional*): patterns of layers that stay dense. By default in a transformers model
            all that is outside its base model (the head), poolers and embeddings; in another model
            `hf_dynsparse.nn.replace.DENSE_PARTS`. Weights that two modules share are never replaced, nor are
            subclasses of `nn.Linear`.
        calibration (`Calibration` or `Iterable[Mapping[str, torch.Tensor]]`, *optional*): batches of inputs, without
            labels, or these with settings. The model is then pruned layer by layer by what passes through it, and
            what each layer keeps is fitted to the outputs of the dense one. Takes a minute for a small encoder.

    Raises:
        ValueError: if no layer matches, a block does not divide one of them, the model is quantised already, or there
            are too few inputs to calibrate it; the model is then untouched.

    Example:
        ```python
        >>> model = sparsify_(AutoModelForMaskedLM.from_pretrained("FacebookAI/roberta-base"), sparsity=0.9)
        >>> model.save_pretrained("sparse-roberta")
        >>> model = AutoModelForSequenceClassification.from_pretrained("sparse-roberta")
        ```
    """
    if not isinstance(model, PreTrainedModel):
        shape, ignore = as_block_shape(block_size), DENSE_PARTS if ignore is None else ignore
        nnzb = plan_blocks(model, shape, sparsity, distribution, targets, ignore)
        replace_by_sparse_(model, calibrate_(model, nnzb, shape, calibration), shape)
        return model
    quantizer = _our_quantizer(model, "sparsify_", "Load it without quantisation.")
    config = DynSparseQuantizationConfig(block_size, sparsity, distribution, targets, ignore)
    if isinstance(model, DynSparseBertPreTrainedModel):
        return _sparsify_bert_(model, config, calibration)
    check_one_block_size(model, config)
    config.nnzb = calibrate_(model, plan_stock(model, config), config.block_shape, calibration)
    if quantizer is None:
        DynSparseQuantizer(config, pre_quantized=False).attach_(model)
    else:
        quantizer.quantization_config = model.config.quantization_config = config
        quantizer.put_layers_(model)
        quantizer.write_config(model)
    return model


def densify_(model: nn.Module) -> nn.Module:
    """
    Replace, in place, every sparse layer by a dense one with the same outputs; a transformers model is then a stock
    one again, and saves as such. Optimiser state must be made anew.

    Raises:
        ValueError: if the model has no sparse layer, is quantised, or is of a stock class with a distance bias, which
            would be lost.
    """
    _our_quantizer(model, "densify_", "Call `model.dequantize()` first.")
    for module in model.modules():
        if isinstance(vars(module).get("hf_quantizer"), DynSparseQuantizer):
            check_stock(cast(PreTrainedModel, module).config, "A model to become stock")
    replace_by_dense_(model)
    for module in model.modules():  # the transformers model may be a part of another, such as PEFT's
        quantizer = vars(module).get("hf_quantizer")
        if isinstance(quantizer, DynSparseQuantizer):
            quantizer.remove_quantization_config(module)
    return model


def _our_quantizer(model: nn.Module, function: str, fix: str) -> DynSparseQuantizer | None:
    quantizer = vars(model).get("hf_quantizer")
    if quantizer is not None and not isinstance(quantizer, DynSparseQuantizer):
        raise ValueError(
            f"`{function}` needs weights in floating point. Got a {type(model).__name__} quantised by "
            f"{type(quantizer).__name__}. {fix}"
        )
    return quantizer


def _sparsify_bert_(model: Any, how: DynSparseQuantizationConfig, calibration: Any) -> nn.Module:
    """A DynSparse BERT has sparse layers by its own configuration, and in its encoder only."""
    config, encoder = model.config, model.base_model.encoder
    nnzb, shapes = plan_stock(model, how), encoder_shapes(config)
    outside = [name for name in nnzb if name.rpartition("encoder.")[2] not in shapes]
    if outside:
        raise ValueError(
            f"Only the encoder of a DynSparse BERT can be sparse. Got `{outside[0]}`: change `targets` or `ignore`."
        )
    check_one_block_size(encoder, how)
    replace_by_sparse_(model, calibrate_(model, nnzb, how.block_shape, calibration), how.block_shape)
    config.block_size, config.distribution = how.block_size, how.distribution
    tell_config_(model, {"sparsity": how.sparsity, "nnzb": None})
    return model
