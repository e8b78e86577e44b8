"""Checkpoints written by earlier versions load with the weights they were saved with, and their runs resume."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from fixtures.write_checkpoints import MODELS, RUNS, STEPS, STOP, logits, trainer
from safetensors.torch import load_file

from hf_dynsparse.checkpoints.loading import load_model


VERSIONS = sorted(path.parent for path in Path(__file__).parents[1].glob("fixtures/*/written_by.json"))
everywhere = pytest.mark.parametrize("version", VERSIONS, ids=[folder.name for folder in VERSIONS])


@everywhere
@pytest.mark.parametrize("name", MODELS)
def test_a_model_computes_what_it_did(version, name):
    (architecture,) = json.loads((version / name / "config.json").read_text())["architectures"]
    cls = getattr(transformers, architecture.replace("DynSparseBertFor", "AutoModelFor"))
    model, info = cls.from_pretrained(version / name, output_loading_info=True)
    assert not any(info.values())
    saved = load_file(version / "logits.safetensors")[name]
    torch.testing.assert_close(logits(model), saved, rtol=0, atol=1e-5)
    assert torch.equal(logits(load_model(version / name)), logits(model))


@everywhere
@pytest.mark.parametrize("method", RUNS)
def test_a_run_resumes_to_the_weights_of_the_run_that_went_on(version, method, tmp_path):
    """The first weights are of another seed: what the resumed run ends with comes from the checkpoint."""
    shutil.copytree(version / method, tmp_path / method)
    resumed = trainer(method, str(tmp_path / method), seed=1)
    resumed.train(resume_from_checkpoint=str(tmp_path / method / f"checkpoint-{STOP}"))
    ended = load_file(tmp_path / method / f"checkpoint-{STEPS}" / "model.safetensors")
    expected = load_file(version / method / "final.safetensors")
    assert ended.keys() == expected.keys()
    for name, tensor in expected.items():
        if tensor.is_floating_point():  # another processor may round otherwise
            torch.testing.assert_close(ended[name], tensor, rtol=0, atol=1e-6)
        else:
            assert torch.equal(ended[name], tensor), name
