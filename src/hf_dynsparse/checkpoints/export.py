"""Out of a sparse checkpoint, and into one: dense folders, ONNX, exported programs, BSR tensors."""

import copy
import json
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel

from .. import models
from ..blocks.sizes import BlockSize
from ..calibration import Calibration
from ..compress.int8.quantizer import int8_modules
from ..data.calibration import read_calibration
from ..files import written_aside
from ..models.auto import is_dense
from ..models.bert.modeling_dynsparse_bert import DynSparseBertPreTrainedModel
from ..models.checksums import once_each
from ..models.position_bias import check_stock
from ..models.sparsify import densify_, sparsify_
from ..models.stock.configuration import DynSparseQuantizationConfig
from ..nn.linear import sparse_layers
from .loading import copy_companions, load_config, load_model, load_tokenizer, model_class, pinned


Source = str | Path | PreTrainedModel

# Of a sparse weight, in a file of BSR tensors: the attributes of a `torch.sparse_bsr_tensor`.
BSR_PARTS = ("crow_indices", "col_indices", "values")


def sparsify_checkpoint(
    source: str | Path,
    target: str | Path,
    *,
    sparsity: float = 0.9,
    block_size: BlockSize = 16,
    distribution: str = "uniform",
    calibration: Calibration | str | None = None,
    calibration_samples: int = 512,
    save_statistics: str | Path | None = None,
    statistics: str | Path | None = None,
) -> None:
    """
    Make a dense checkpoint sparse: each matrix keeps its blocks of largest L1 norm or, with `calibration`, those that
    matter most to its outputs, fitted to these. A BERT becomes a DynSparse BERT, another architecture a stock model
    with sparse layers, as by [`sparsify_`]. The head is that of the checkpoint.

    Args:
        source (`str` or `Path`): a folder, or a repository of the Hub as `"user/name"` or `"user/name@revision"`.
        target (`str` or `Path`): the new folder. Tokenizer and the like come along.
        sparsity, block_size, distribution: see [`DynSparseBertConfig`].
        calibration (`str` or `Calibration`, *optional*): a text file, a sentence or paragraph a line, that the
            tokenizer of the checkpoint reads; or inputs with settings.
        calibration_samples (`int`, defaults to 512): lines of the file to use, evenly from the whole of it.
        save_statistics (`str` or `Path`, *optional*): beside a text file: a new file for what the dense model reads.
        statistics (`str` or `Path`, *optional*): such a file, in the place of text; see [`Calibration`].

    Raises:
        FileExistsError: if `target` exists and is more than an empty folder.
        ValueError: if `source` is sparse already, a block does not divide a matrix, or there is too little text.
    """
    source = pinned(source)
    config = load_config(source)
    if not is_dense(config):
        raise ValueError(f"`source` must be dense. Got {source}, which is sparse. Convert it to dense first.")
    settings: dict[str, Any] = {"sparsity": sparsity, "block_size": block_size, "distribution": distribution}
    ours = getattr(models, f"DynSparse{model_class(config).__name__.removeprefix('DynSparse')}", None)
    if isinstance(calibration, str):
        batches = read_calibration(calibration, load_tokenizer(source), calibration_samples)
        calibration = Calibration(batches, save_statistics=save_statistics)
    elif statistics is not None:
        calibration = Calibration(statistics=statistics)
    with written_aside(target) as folder:
        model: Any
        if ours is not None:
            model = load_model(source, ours, **settings, calibration=calibration)
        elif calibration is not None:
            model = sparsify_(load_model(source), **settings, calibration=calibration)
        else:
            model = load_model(source, quantization_config=DynSparseQuantizationConfig(**settings))
        model.save_pretrained(folder)
        copy_companions(source, folder)


def export_dense(source: Source, target: str | Path) -> None:
    """
    Write the dense model with the same outputs: a stock folder, which transformers loads without this package.

    Args:
        source (`str`, `Path` or `PreTrainedModel`): a folder, a repository of the Hub, or a model in memory, which is
            not changed.
        target (`str` or `Path`): the new folder. Tokenizer and the like come along from a folder or repository.

    Raises:
        FileExistsError: if `target` exists and is more than an empty folder.
        ValueError: if the model has a distance bias, which stock classes leave out.

    Example:
        ```python
        >>> export_dense("runs/medium-s90-b16", "medium-dense")
        >>> model = BertForMaskedLM.from_pretrained("medium-dense")
        ```
    """
    source = source if isinstance(source, PreTrainedModel) else pinned(source)
    with written_aside(target) as folder:
        _dense_copy(_loaded(source)).save_pretrained(folder)
        if not isinstance(source, PreTrainedModel):
            copy_companions(source, folder)


def export_onnx(source: Source, file: str | Path) -> None:
    """
    Write an ONNX model with dense weights in float32, for any batch size and sequence length. Needs
    `pip install 'hf_dynsparse[onnx]'`.

    Inputs are `input_ids`, `attention_mask` and, for a model of several types, `token_type_ids`: `int64` of shape
    `(batch, sequence)`, or `(batch, choices, sequence)` for multiple choice. Outputs have the names that they have in
    transformers, such as `logits`. Weights of more than 1.5 GB stand in a second file beside, `<file>.data`.

    Args:
        source (`str`, `Path` or `PreTrainedModel`): a folder, a repository of the Hub, or a model in memory, which is
            not changed.
        file (`str` or `Path`): the new file.

    Raises:
        FileExistsError: if `file` exists.
        ImportError: if the packages for ONNX are not installed.

    Example:
        ```python
        >>> export_onnx("runs/medium-s90-b16", "medium.onnx")
        >>> (logits,) = onnxruntime.InferenceSession("medium.onnx").run(["logits"], inputs)
        ```
    """
    if find_spec("onnxscript") is None:
        raise ImportError("ONNX export needs onnxscript. It could not be found: `pip install 'hf_dynsparse[onnx]'`.")
    with written_aside(file) as aside, warnings.catch_warnings(), torch.no_grad():
        # torch's exporter asks its own pytree in a way that it has deprecated.
        warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)`", FutureWarning)
        dense = _densified(_loaded(source)).float().eval()
        outputs = dense(**_example_inputs(dense))
        names = [name for name, output in outputs.items() if torch.is_tensor(output)]
        program: Any = torch.onnx.export(export_program(dense), (), output_names=names, dynamo=True, verbose=False)
        axes = program.model.graph.inputs[0].shape
        program.rename_axes(dict(zip(axes, _axis_names(dense), strict=True)))
        program.save(aside)


def export_program(source: Source) -> torch.export.ExportedProgram:
    """
    The model as `torch.export` sees it, sparse as it is, for any batch size and sequence length; inputs as in
    [`export_onnx`]. `torch.export.save` writes it, and `torch.export.load` reads it after `import hf_dynsparse`, which
    brings the operators of sparse layers.

    Args:
        source (`str`, `Path` or `PreTrainedModel`): a folder, a repository of the Hub, or a model in memory in
            evaluation mode.

    Raises:
        ValueError: if the model is in training mode: dropout would be exported with it.

    Example:
        ```python
        >>> program = export_program("runs/medium-s90-b16")
        >>> logits = program.module()(**tokenizer("a sentence", return_tensors="pt")).logits
        ```
    """
    model = _loaded(source)
    if model.training:
        raise ValueError("A model must be in evaluation mode to be exported. Got training mode. Call `model.eval()`.")
    inputs = _example_inputs(model)
    longest = getattr(model.config, "max_position_embeddings", None)
    sizes = [torch.export.Dim(name, max=longest if name == "sequence" else None) for name in _axis_names(model)]
    remembers = getattr(model.config, "use_cache", False)
    if remembers:  # a cache for generation among the outputs is no tensor
        model.config.use_cache = False
    try:
        shapes = dict.fromkeys(inputs, dict(enumerate(sizes)))
        return torch.export.export(model, (), kwargs=inputs, dynamic_shapes=shapes)
    finally:
        if remembers:
            model.config.use_cache = True


def export_bsr(source: Source, file: str | Path) -> None:
    """
    Write the weights for use with PyTorch's own sparse tensors: one safetensors file, which [`read_bsr`] reads.

    A sparse weight `name` of shape `(out_features, in_features)` stands there as `name.crow_indices`,
    `name.col_indices` (both `torch.int32`) and `name.values` `(nnzb, rows, columns)`, in the order of rows; the
    metadata `shapes` is a JSON object of name -> shape. All other tensors stand there as in the dense model.

    Args:
        source (`str`, `Path` or `PreTrainedModel`): a folder, a repository of the Hub, or a model in memory.
        file (`str` or `Path`): the new file.

    Raises:
        FileExistsError: if `file` exists.
        ValueError: if the model has a distance bias, which no tensor says.
    """
    with written_aside(file) as aside:
        model = _loaded(source)
        check_stock(model.config, "A model to become BSR tensors")
        layers = sparse_layers(model)
        tensors = {
            key: tensor.contiguous()
            for key, tensor in once_each(model, model.state_dict()).items()
            if key.rpartition(".")[0] not in layers or key.endswith(".bias")
        }
        shapes = {f"{name}.weight": layer.shape for name, layer in layers.items()}
        for name, layer in layers.items():
            order = layer.layout.by_row
            parts = order.offsets, order.columns, layer.values.detach()[order.slots]
            tensors |= {f"{name}.weight.{part}": tensor for part, tensor in zip(BSR_PARTS, parts, strict=True)}
        save_file(tensors, aside, {"shapes": json.dumps(shapes)})


def read_bsr(file: str | Path) -> dict[str, torch.Tensor]:
    """
    Read what [`export_bsr`] has written.

    Returns:
        `dict[str, torch.Tensor]`: every tensor by its name in the dense model; a sparse weight as
        `torch.sparse_bsr_tensor` of shape `(out_features, in_features)`. PyTorch multiplies by square blocks only.

    Raises:
        ValueError: if the file is another one.

    Example:
        ```python
        >>> weights = read_bsr("medium-bsr.safetensors")
        >>> (weights["bert.encoder.layer.0.intermediate.dense.weight"] @ hidden.T).T
        ```
    """
    with safe_open(file, framework="pt") as saved:
        shapes = (saved.metadata() or {}).get("shapes")
        tensors = {key: saved.get_tensor(key) for key in saved.keys()}  # noqa: SIM118  (not a dict)
    if shapes is None:
        raise ValueError(f"A file of BSR tensors must hold `shapes` among its metadata. Got {file}, which does not.")
    for name, shape in json.loads(shapes).items():
        crow_indices, col_indices, values = (tensors.pop(f"{name}.{part}") for part in BSR_PARTS)
        tensors[name] = torch.sparse_bsr_tensor(crow_indices, col_indices, values, shape, check_invariants=True)
    return tensors


def _loaded(source: Source) -> PreTrainedModel:
    model = source if isinstance(source, PreTrainedModel) else load_model(source)
    if int8_modules(model):
        raise ValueError(
            f"Only weights in floating point can be exported. Got an int8 {type(model).__name__}. Call "
            "`model.dequantize()` first."
        )
    return model


def _dense_copy(model: PreTrainedModel) -> PreTrainedModel:
    return model.to_dense() if isinstance(model, DynSparseBertPreTrainedModel) else _densified(model)


def _densified(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of the same class and shapes: a slimmed model stays slim, which no stock class can be."""
    dense = copy.deepcopy(model)
    if sparse_layers(dense):
        densify_(dense)
    return dense


def _axis_names(model: PreTrainedModel) -> tuple[str, ...]:
    choices = ("choices",) if "MultipleChoice" in type(model).__name__ else ()
    return ("batch", *choices, "sequence")


def _example_inputs(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """
    Inputs of no particular size: 0 and 1 would be taken for constants. No two are one tensor: their uses would be
    taken for one as well.
    """
    shape = [2, 3, 8][: len(_axis_names(model)) - 1] + [8]
    names = ["input_ids", "attention_mask"]
    # GPT-2 reads any token as a type: only where types are something by themselves.
    if getattr(model.config, "type_vocab_size", 1) > 1:
        names.append("token_type_ids")
    return {name: torch.ones(shape, dtype=torch.int64, device=model.device) for name in names}
