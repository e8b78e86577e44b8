"""The short README.md beside a saved model: what to install to load it. It never replaces one that is there."""

import math
from functools import partial
from pathlib import Path
from string import Template
from typing import Any

from transformers import PreTrainedModel

from ..nn.linear import sparse_layers


README = "README.md"
TEMPLATE = Path(__file__).with_name("readme.md")

# How the two kinds of README.md that this package writes are told from any other.
SHORT = "<!-- Written by hf_dynsparse beside a saved model"
CARD = "<!-- A model card by hf_dynsparse"


def write_readme(model: PreTrainedModel, folder: str | Path) -> None:
    """
    Write a short README.md beside a model that was saved in `folder`, unless there is one. Checkpoints in the middle
    of a run have none.
    """
    from .._transformers import PREFIX_CHECKPOINT_DIR  # brings PEFT, where that is installed: a second

    path = Path(folder, README)
    if path.exists() or path.absolute().parent.name.startswith(f"{PREFIX_CHECKPOINT_DIR}-"):
        return
    layers, about, tags = list(sparse_layers(model).values()), [], []
    if layers:
        exist = sum(layer.nnzb * math.prod(layer.block_shape) for layer in layers)
        share = exist / sum(layer.in_features * layer.out_features for layer in layers)
        about.append(f"block-sparse: {share:.2%} of the entries of {len(layers)} matrices are stored")
        tags.append("block-sparse")
    how = getattr(model.config, "quantization_config", None)
    if how is not None and "int8" in str(how.quant_method):
        about.append("with integers of 8 bits as weights")
        tags.append("int8")
    name = type(model).__name__
    text = Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        name=path.absolute().parent.name,
        model_class=name,
        about="; ".join(about) or "a model of hf_dynsparse",
        tags="\n".join(f"- {tag}" for tag in tags),
        package="hf_dynsparse" if name.startswith("DynSparse") else "transformers",
    )
    path.write_text(text.replace("\n\n---", "\n---"), encoding="utf-8")


def is_ours(folder: str | Path, *kinds: str) -> bool:
    """Whether `folder` holds no README.md, or one that this package wrote, of these `kinds` (`SHORT`, `CARD`)."""
    path = Path(folder, README)
    if not path.exists():
        return True
    text = path.read_text(encoding="utf-8", errors="replace")
    return any(kind in text for kind in kinds)


def write_readmes_(model: Any) -> None:
    """Let `model.save_pretrained`, of a class that is not ours, write a README.md too."""
    model.save_pretrained = partial(save_with_readme, model)


def save_with_readme(
    model: Any, save_directory: Any, is_main_process: bool = True, state_dict: Any = None, *args: Any, **kwargs: Any
) -> None:
    """As `model.save_pretrained`, of an adapter too; beside a whole sparse model a README.md."""
    quantizer = vars(model).get("hf_quantizer")
    if quantizer is not None:  # of such a model transformers does not save the state that it is given
        quantizer.given_state = state_dict
    try:
        type(model).save_pretrained(model, save_directory, is_main_process, state_dict, *args, **kwargs)
    finally:
        if quantizer is not None:
            quantizer.given_state = None
    if is_main_process and not model._hf_peft_config_loaded and "hf_quantizer" in vars(model):
        write_readme(model, save_directory)
