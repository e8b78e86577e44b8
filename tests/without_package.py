"""
A reader who has transformers but not this package: `without_package.py REPORT.json ANSWERS.pt SOURCE=AutoClass ...`.

Loads each SOURCE, a folder or a repository, with the code beside it, and reports how the outputs compare with ANSWERS,
and what it says to those who do not trust the code.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch


class Absent:
    """Makes this package look as if it were not installed."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.partition(".")[0] == "hf_dynsparse":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, Absent())

import transformers  # noqa: E402


def compare(source: str, auto_class: str, answers: dict[str, Any]) -> dict[str, Any]:
    """Outputs and gradients of the model in `source` against those of the package."""
    loader = getattr(transformers, auto_class)
    model = loader.from_pretrained(source, trust_remote_code=True).eval()
    outputs = model(**answers["inputs"], output_hidden_states=True)
    outputs.hidden_states[-1].square().sum().backward()
    first = outputs[0] if outputs[0].dim() else outputs[1]  # not the loss
    state = model.state_dict()
    saved_again = os.path.join(os.environ["HF_HOME"], auto_class)
    model.save_pretrained(saved_again)
    return {
        "outputs": float((first - answers["outputs"]).abs().max()),
        "gradients": max(
            float((gradient - model.get_parameter(name).grad).abs().max())
            for name, gradient in answers["gradients"].items()
        ),
        "same state": all(torch.equal(state[name], tensor) for name, tensor in answers["state"].items()),
        "entries": sum(parameter.numel() for parameter in model.parameters()),
        "class": f"{type(model).__module__.partition('.')[0]}.{type(model).__name__}",
        "saved again": sorted(os.listdir(saved_again)),
    }


def refused(source: str, auto_class: str) -> str:
    """What a reader is told who does not trust the code."""
    try:
        getattr(transformers, auto_class).from_pretrained(source)
    except ValueError as error:
        return str(error)
    return "loaded"


def main() -> None:
    """Compare all sources."""
    report, answers = Path(sys.argv[1]), torch.load(sys.argv[2])
    found = {}
    for argument in sys.argv[3:]:
        source, _, auto_class = argument.rpartition("=")
        found[auto_class] = compare(source, auto_class, answers[auto_class]) if auto_class in answers else {}
        found[auto_class]["without trust"] = refused(source, auto_class)
    report.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
