"""Checkpoints that bring their code: what is written, and that it computes the same where the package is missing."""

import ast
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from loopback import run_script
from toy import toy_batch, toy_model, toy_tokenizer
from transformers import AutoModelForMaskedLM, BertConfig, BertForMaskedLM

import hf_dynsparse
from hf_dynsparse import DynSparseBertConfig, DynSparseBertForMaskedLM, models, save_with_code
from hf_dynsparse.checkpoints.remote_code import AUTO_MAP


HEADS = {auto: getattr(models, name.rpartition(".")[2]) for auto, name in AUTO_MAP.items() if auto != "AutoConfig"}
THIRD_PARTY = {"torch", "transformers", "huggingface_hub", "safetensors"}  # the last two come with transformers


def answers_of(model: Any) -> dict[str, Any]:
    """Inputs, and what the model with the package makes of them."""
    inputs = {name: toy_batch()[name] for name in ("input_ids", "attention_mask")}
    if "MultipleChoice" in type(model).__name__:
        inputs = {name: tensor.view(2, 2, -1) for name, tensor in inputs.items()}
    outputs = model.eval()(**inputs, output_hidden_states=True)
    model.zero_grad()
    outputs.hidden_states[-1].square().sum().backward()
    return {
        "inputs": inputs,
        "outputs": outputs[0].detach(),
        "gradients": {name: p.grad for name, p in model.named_parameters() if p.grad is not None},
        "state": model.state_dict(),
        "entries": sum(parameter.numel() for parameter in model.parameters()),
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A masked language model with its code and tokenizer. Not to be changed."""
    path = tmp_path_factory.mktemp("model")
    save_with_code(toy_model(), path)
    toy_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a process without the package makes of every head, and what this one does."""
    work = tmp_path_factory.mktemp("heads")
    answers = {}
    for number, (auto, head) in enumerate(HEADS.items()):
        block_size = (1, 4, 8, (2, 8))[number % 4]
        more: dict[str, Any] = {"position_bias": ("alibi", "t5")[number // 2 % 2]}
        if number % 2:
            more = {"heads_per_layer": [1, 2], "intermediate_sizes": [16, 64]}
        model = toy_model(number, head, block_size=block_size, sparsity=0.5, **more)
        save_with_code(model, work / auto)
        answers[auto] = answers_of(model)
    torch.save(answers, work / "answers.pt")
    toy_model().save_pretrained(work / "plain")
    sources = [f"{work / auto}={auto}" for auto in HEADS] + [f"{work / 'plain'}=AutoConfig"]
    home = str(work / "home")
    report = run_script("without_package.py", str(work / "answers.pt"), *sources, HF_HOME=home, HF_HUB_OFFLINE="1")
    return report | {auto: {**report[auto], "answers": answers[auto]} for auto in HEADS}


@pytest.mark.parametrize("auto", HEADS)
def test_the_same_without_the_package(found: dict[str, Any], auto: str) -> None:
    result = found[auto]
    assert result["class"] == f"transformers_modules.{HEADS[auto].__name__}"
    assert result["outputs"] < 1e-5
    assert result["gradients"] < 1e-3  # of a sum of squares over all tokens
    assert result["same state"]
    assert result["entries"] == result["answers"]["entries"]  # active entries only


@pytest.mark.parametrize("auto", HEADS)
def test_saving_without_the_package_keeps_the_code(found: dict[str, Any], auto: str, folder: Path) -> None:
    code = {path.name for path in folder.glob("*.py")}
    assert set(found[auto]["saved again"]) == {*code, "config.json", "model.safetensors"}


def test_without_trust_or_without_code_the_error_is_of_transformers(found: dict[str, Any]) -> None:
    for auto in HEADS:  # what to install stands in the card, and in the code
        assert "trust_remote_code=True" in found[auto]["without trust"]
        assert (
            "inspect the repository content at" in found[auto]["without trust"]
        )  # where the card says what to install
    assert "model type `dynsparse_bert` but Transformers does not recognize" in found["AutoConfig"]["without trust"]


def test_every_registered_class_is_in_the_map() -> None:
    registered = {
        name: f"modeling_dynsparse_bert.{getattr(transformers, name)._model_mapping[DynSparseBertConfig].__name__}"
        for name in dir(transformers)
        if name.startswith("AutoModel")
        and DynSparseBertConfig in getattr(getattr(transformers, name), "_model_mapping", ())
    }
    assert {"AutoConfig": "configuration_dynsparse_bert.DynSparseBertConfig", **registered} == AUTO_MAP


def test_files_import_nothing_but_each_other_and_transformers(folder: Path) -> None:
    files = list(folder.glob("*.py"))
    kernels = {path.stem for path in (Path(hf_dynsparse.__file__).parent / "ops").glob("*.py")} - {
        "__init__",
        "reference",
    }
    assert len(files) > 5
    assert kernels.isdisjoint(file.stem.removeprefix("dynsparse_ops_") for file in files)
    for file in files:
        source = file.read_text()
        assert "pip install hf_dynsparse" in source
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1
                assert (folder / f"{node.module}.py").is_file(), f"{file.name} imports {node.module}"
            elif isinstance(node, ast.Import | ast.ImportFrom):
                names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
                for name in names:
                    top = name.partition(".")[0]
                    assert top in THIRD_PARTY or top in sys.stdlib_module_names, f"{file.name} imports {name}"


@pytest.mark.parametrize("trust", [None, True])
def test_with_the_package_its_class_serves(folder: Path, trust: bool | None) -> None:
    model = AutoModelForMaskedLM.from_pretrained(folder, trust_remote_code=trust)
    assert type(model) is DynSparseBertForMaskedLM
    for name, tensor in toy_model().state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_from_a_folder(folder: Path, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    toy_model().save_pretrained(plain)
    toy_tokenizer().save_pretrained(plain)
    (plain / "README.md").write_text("# card")
    (plain / "optimizer.pt").write_bytes(b"moments")
    save_with_code(plain, tmp_path / "copy")
    names = {path.name for path in folder.iterdir()}
    assert {path.name for path in (tmp_path / "copy").iterdir()} == {*names, "README.md"}
    for name in names - {"README.md"}:
        assert (tmp_path / "copy" / name).read_bytes() == (folder / name).read_bytes(), name
    save_with_code(plain, plain)  # in place
    assert {path.name for path in plain.iterdir()} == {*names, "README.md", "optimizer.pt"}
    assert json.loads((plain / "config.json").read_text())["auto_map"] == AUTO_MAP


def test_the_short_readme_says_how_to_load_it(folder: Path, tmp_path: Path) -> None:
    line = 'AutoModelForMaskedLM.from_pretrained("{}", trust_remote_code=True)'
    assert line.format(folder.name) in (folder / "README.md").read_text()
    toy_model().save_pretrained(tmp_path / "plain")
    for _ in range(2):
        save_with_code(tmp_path / "plain", tmp_path / "code")
        assert (tmp_path / "code" / "README.md").read_text().count(line.format("code")) == 1
    assert "trust_remote_code" not in (tmp_path / "plain" / "README.md").read_text()


def test_other_models_are_refused(tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    bert = BertForMaskedLM(BertConfig(vocab_size=32, **sizes))
    with pytest.raises(ValueError, match="Only a DynSparse BERT .* Got BertForMaskedLM"):
        save_with_code(bert, tmp_path / "code")
    bert.save_pretrained(tmp_path / "bert")
    with pytest.raises(ValueError, match="Only a DynSparse BERT .* of type 'bert'"):
        save_with_code(tmp_path / "bert", tmp_path / "code")
    assert not (tmp_path / "code").exists()
