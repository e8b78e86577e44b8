"""The notebook: it holds code and no outputs, and its cells run one after the other."""

import json
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import torch
from huggingface_hub import constants

from tests.scripts import EXAMPLES


NOTEBOOK = EXAMPLES / "first_steps.ipynb"


@pytest.fixture(scope="module")
def cells():
    return [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]


def test_it_holds_no_outputs(cells):
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)


def test_its_cells_run_in_order(cells, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path))  # where the text is kept
    plt.switch_backend("agg")
    found = {}
    for number, cell in enumerate(cells):
        exec(compile("".join(cell["source"]), f"cell {number}", "exec"), found)
    plt.close("all")
    ids = torch.tensor([found["train"][0]["input_ids"]])
    assert torch.equal(found["loaded"](ids).logits, found["model"].eval()(ids).logits)
    assert 0 < found["new"].sum() == found["gone"].sum() < found["layer"].nnzb
    entries = [entry["loss"] for entry in found["trainer"].state.log_history if "loss" in entry]
    assert entries[-1] < entries[0]
    assert 0 < found["errors"]["calibrated"] < found["errors"]["by norm"] / 2
