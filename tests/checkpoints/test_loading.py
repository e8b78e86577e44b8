"""The class of a saved model, the files beside its weights, and writing whole or not."""

import pytest
from huggingface_hub import constants
from toy import toy_config, toy_model
from transformers import BertConfig, BertForMaskedLM

from hf_dynsparse import DynSparseBertForTokenClassification
from hf_dynsparse.checkpoints.loading import copy_companions, load_model, model_class, split_revision
from hf_dynsparse.files import written_aside


@pytest.mark.parametrize(
    ("source", "parts"),
    [
        ("user/name", ("user/name", "main")),
        ("user/name@v1.0", ("user/name", "v1.0")),
        ("user/name@refs/pr/1", ("user/name", "refs/pr/1")),
    ],
)
def test_revisions(source, parts):
    assert split_revision(source) == parts


def test_a_folder_with_an_at_sign_has_no_revision(tmp_path):
    folder = tmp_path / "run@2"
    folder.mkdir()
    assert split_revision(folder) == (str(folder), "main")


@pytest.mark.parametrize("architectures", [None, [], ["MyBert"]])
def test_the_class_must_be_known(architectures):
    assert model_class(toy_config(architectures=["BertForMaskedLM"])) is BertForMaskedLM
    with pytest.raises(ValueError, match=r"`architectures` in config.json must name a class of transformers or"):
        model_class(BertConfig(architectures=architectures))


def test_a_model_comes_with_its_head(tmp_path):
    toy_model(cls=DynSparseBertForTokenClassification, num_labels=3).save_pretrained(tmp_path)
    model = load_model(tmp_path)
    assert type(model) is DynSparseBertForTokenClassification
    assert (model.num_labels, model.training) == (3, False)


@pytest.mark.parametrize("source", ["nowhere", "no where"])
def test_what_is_no_model_is_named(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match=rf"A model must be a folder with a config.json .* Got {source}: "):
        load_model(source)


def test_companions_travel_and_replace_nothing(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    for folder in (source, target):
        folder.mkdir()
    for name in ("tokenizer.json", "vocab.txt", "LICENSE", "README.md", "model.safetensors", "optimizer.pt"):
        (source / name).write_text("of the source")
    (source / "tokenizer").mkdir()
    (target / "vocab.txt").write_text("of the target")
    for name in ("modules.json", "1_Pooling/config.json", "checkpoint-1/config.json"):  # of a sentence encoder
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text("of the source")
    copy_companions(source, target)
    found = {str(path.relative_to(target)): path.read_text() for path in target.rglob("*") if path.is_file()}
    assert found.pop("vocab.txt") == "of the target"
    assert set(found) == {"tokenizer.json", "LICENSE", "modules.json", "1_Pooling/config.json"}
    assert set(found.values()) == {"of the source"}


def test_a_folder_appears_whole(tmp_path):
    target = tmp_path / "new" / "model"
    with written_aside(target) as folder:
        folder.mkdir()
        (folder / "a").write_text("a")
        assert not target.exists()
    assert [path.name for path in target.parent.iterdir()] == ["model"]
    assert (target / "a").read_text() == "a"


def test_a_file_brings_its_neighbours(tmp_path):
    with written_aside(tmp_path / "model.onnx") as file:
        file.write_text("model")
        (file.parent / "model.onnx.data").write_text("weights")
        assert file.name == "model.onnx"
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "model.onnx": "model",
        "model.onnx.data": "weights",
    }


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_after_an_error_nothing_stands_there(tmp_path, error):
    def fail(folder):
        folder.mkdir()
        (folder / "half").write_text("")
        raise error

    with pytest.raises(error), written_aside(tmp_path / "model") as folder:
        fail(folder)
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_is_no_obstacle(tmp_path):
    left = tmp_path / ".model.incomplete" / "model"
    left.mkdir(parents=True)
    (left / "half").write_text("")
    (tmp_path / "model").mkdir()  # empty: as good as none
    with written_aside(tmp_path / "model") as folder:
        folder.mkdir()
        (folder / "whole").write_text("")
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == ["model", "model/whole"]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_nothing_is_overwritten(tmp_path, kind):
    target = tmp_path / "model"
    if kind == "folder":
        target.mkdir()
    kept = target / "kept" if kind == "folder" else target
    kept.write_text("kept")
    with pytest.raises(FileExistsError, match="The target must not exist yet"), written_aside(target):
        pass
    assert kept.read_text() == "kept"
    assert list(tmp_path.iterdir()) == [target]
