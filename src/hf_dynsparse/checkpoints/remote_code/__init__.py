"""`save_with_code`: a checkpoint that brings its modelling code along, for readers who do not have this package."""

import json
import re
import shutil
from collections.abc import Mapping
from importlib.util import resolve_name
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ...files import write_atomically
from ...models import DynSparseBertConfig
from ...models.bert.modeling_dynsparse_bert import DynSparseBertPreTrainedModel
from ...models.readme import README, SHORT


__all__ = ["AUTO_MAP", "add_code", "save_with_code"]

_CONFIGURATION, _MODELING = "configuration_dynsparse_bert", "modeling_dynsparse_bert"

# Which class in which file serves each Auto class.
AUTO_MAP = {
    "AutoConfig": f"{_CONFIGURATION}.DynSparseBertConfig",
    "AutoModel": f"{_MODELING}.DynSparseBertModel",
    "AutoModelForMaskedLM": f"{_MODELING}.DynSparseBertForMaskedLM",
    "AutoModelForMultipleChoice": f"{_MODELING}.DynSparseBertForMultipleChoice",
    "AutoModelForPreTraining": f"{_MODELING}.DynSparseBertForPreTraining",
    "AutoModelForQuestionAnswering": f"{_MODELING}.DynSparseBertForQuestionAnswering",
    "AutoModelForSequenceClassification": f"{_MODELING}.DynSparseBertForSequenceClassification",
    "AutoModelForTokenClassification": f"{_MODELING}.DynSparseBertForTokenClassification",
}

# Beside a checkpoint these modules replace others: no kernels, no calibrated pruning and no README.md are taken along.
REPLACED_BY = {
    "ops": "checkpoints.remote_code.plain_ops",
    "models.calibrated": "checkpoints.remote_code.no_calibration",
    "models.readme": "checkpoints.remote_code.no_readme",
}

_HEADER = """\
# A copy of hf_dynsparse/{file}, for those who do not have that package:
#     AutoModel.from_pretrained(..., trust_remote_code=True)
# With it (`pip install hf_dynsparse`, then `import hf_dynsparse`) this file is not run, and the model is much faster.
"""
# What the short README.md beside a checkpoint says then.
_README = """
Without `hf_dynsparse` the code beside the weights serves, more slowly:

```python
from transformers import {auto_class}

model = {auto_class}.from_pretrained("{name}", trust_remote_code=True)
```
"""
_PACKAGE = Path(__file__).parents[2]


def save_with_code(model_or_folder: PreTrainedModel | str | Path, folder: str | Path) -> None:
    """
    Write a checkpoint that loads where this package is not installed, with
    `AutoModelForMaskedLM.from_pretrained(folder, trust_remote_code=True)` and the Auto classes of all other heads.

    Weights are written as always: active blocks only, and only these are in memory after loading. The code beside them
    is this package's own, with products in plain PyTorch. Where `hf_dynsparse` has been imported, its classes serve.

    Args:
        model_or_folder (`PreTrainedModel`, `str` or `Path`): a DynSparse BERT with any head, or a folder where one was
            saved; its configuration, safetensors files, tokenizer and card are copied.
        folder (`str` or `Path`): where to write. May be the same folder.

    Raises:
        ValueError: if it is not a DynSparse BERT, or int8.

    Example:
        ```python
        >>> save_with_code(model, "sparse-bert")
        >>> tokenizer.save_pretrained("sparse-bert")
        ```
    """
    folder = Path(folder)
    if isinstance(model_or_folder, PreTrainedModel):
        name, is_ours = type(model_or_folder).__name__, isinstance(model_or_folder, DynSparseBertPreTrainedModel)
        _check(name, is_ours, model_or_folder.config.to_dict())
        model_or_folder.save_pretrained(folder)
        source = folder
    else:
        source = Path(model_or_folder)
    files = add_code(source)
    if source.resolve() != folder.resolve():
        folder.mkdir(parents=True, exist_ok=True)
        for file in source.iterdir():
            if file.suffix in (".json", ".safetensors", ".txt", ".md") and file.name not in files:
                shutil.copyfile(file, folder / file.name)
    for name, content in files.items():
        write_atomically(folder / name, content)
    _mention_code(folder)


def add_code(folder: Path) -> dict[str, bytes]:
    """
    What makes the checkpoint in `folder` self-contained, by file name: the code, and a config.json that names it.

    Raises:
        ValueError: if it is not a DynSparse BERT, or int8.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    kind = config.get("model_type")
    _check(f"{folder} of type {kind!r}", kind == DynSparseBertConfig.model_type, config)
    config["auto_map"] = AUTO_MAP
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    return {"config.json": text.encode(), **_modelling_files()}


def _mention_code(folder: Path) -> None:
    """Let the README.md that `save_pretrained` wrote say how to load with the code; no other is changed."""
    readme = folder / README
    text = readme.read_text(encoding="utf-8", errors="replace") if readme.exists() else ""
    if SHORT in text and "trust_remote_code" not in text:
        saved = (json.loads((folder / "config.json").read_text(encoding="utf-8")).get("architectures") or [""])[0]
        auto_class = next((auto for auto, place in AUTO_MAP.items() if place.endswith(f".{saved}")), "AutoModel")
        text += _README.format(auto_class=auto_class, name=folder.resolve().name)
        write_atomically(readme, text.encode())


def _modelling_files() -> dict[str, bytes]:
    """The modules that the models import, and so on, as files of one folder."""
    wanted = [f"models.bert.{_CONFIGURATION}", f"models.bert.{_MODELING}"]
    files = {}
    for module in wanted:
        source, imported = _flatten(REPLACED_BY.get(module, module))
        files[f"{_file_name(module)}.py"] = source.encode()
        wanted += [other for other in imported if other not in wanted]
    return files


def _flatten(module: str) -> tuple[str, list[str]]:
    """The source of a module with imports that fit a single folder, and the modules that it imports."""
    imported: list[str] = []

    def flatten(line: re.Match[str]) -> str:
        target = resolve_name(line[1], package).removeprefix("hf_dynsparse.")
        imported.append(target)
        return f"from .{_file_name(target)} import"

    package, file = f"hf_dynsparse.{module}".rpartition(".")[0], module.replace(".", "/") + ".py"
    source = (_PACKAGE / file).read_text(encoding="utf-8")
    source = re.sub(r"^from (\.[.\w]*) import", flatten, source, flags=re.MULTILINE)
    return _HEADER.format(file=file) + source, imported


def _file_name(module: str) -> str:
    name = module.rpartition(".")[2]
    return name if name in (_CONFIGURATION, _MODELING) else f"dynsparse_{module.replace('.', '_')}"


def _check(what: str, is_ours: bool, config: Mapping[str, Any]) -> None:
    if not is_ours:
        raise ValueError(
            f"Only a DynSparse BERT can bring its code along. Got {what}. Save it by `save_pretrained`: loading a "
            "sparse one needs `pip install hf_dynsparse`."
        )
    if "quantization_config" in config:
        raise ValueError(
            f"The code beside a checkpoint knows weights in floating point only. Got {what}, an int8 model. Call "
            "`model.dequantize()` first, or save it without code, for readers who have `hf_dynsparse`."
        )
