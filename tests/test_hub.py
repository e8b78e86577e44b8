"""The Hub: a real client against a server on this machine, with the package and without; what may be pushed at all."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from loopback import LoopbackHub, loopback_hub
from toy import toy_model, toy_tokenizer
from transformers import BertConfig, BertForMaskedLM

from hf_dynsparse.hub import HubError, fetch_checkpoint, push_folder
from hf_dynsparse.hub.files import check_model, checkpoint_files, model_files


CHECKPOINT = ("checksums.json", "optimizer.pt", "rng_state.pth", "scheduler.pt")  # beside the model
MODEL = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "trainer_state.json")


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoopbackHub]:
    with loopback_hub(tmp_path_factory.mktemp("hub")) as server:
        yield server


@pytest.fixture(scope="module")
def done(hub: LoopbackHub) -> dict[str, Any]:
    """What `hub_worker.py` saw, step by step."""
    return hub.run("hub_worker.py", str(hub.folder / "work"), home="writer")


def test_push_and_load(done: dict[str, Any]) -> None:
    found = done["push_and_load"]
    assert found["bytes"] > 10_000_000
    assert found["route"]["model.safetensors"] == "lfs"
    assert found["same"]
    assert found["trained head kept"]
    assert found["head"] == "DynSparseBertForSequenceClassification"
    assert found["tokenizer"]
    assert found["private"]
    assert found["license"] == "apache-2.0"
    assert found["titles"] == ["Upload a sparse model"]  # the second push had nothing to add
    assert found["tagged"]


def test_only_what_belongs_to_the_model_is_pushed(done: dict[str, Any]) -> None:
    found = done["push_and_load"]
    code = [name for name in found["files"] if name.endswith(".py")]
    assert set(found["files"]) == {"README.md", *MODEL[:4], *code}
    assert "modeling_dynsparse_bert.py" in code
    assert not found["changed here"]


def test_a_reader_without_the_package(hub: LoopbackHub, done: dict[str, Any]) -> None:
    answers = str(hub.folder / "work" / "answers.pt")
    report = hub.run("without_package.py", answers, "tester/big=AutoModelForMaskedLM", home="reader")
    found = report["AutoModelForMaskedLM"]
    assert found["class"] == "transformers_modules.DynSparseBertForMaskedLM"
    assert found["same state"]
    assert found["outputs"] < 1e-5
    assert found["entries"] == done["push_and_load"]["entries"]
    assert "trust_remote_code=True" in found["without trust"]


def test_shards_and_branches(done: dict[str, Any]) -> None:
    found = done["shards"]
    assert found["shards"][-1] == "model.safetensors.index.json"
    assert len(found["shards"]) > 3
    assert "model.safetensors" not in found["shards"]  # transformers would prefer the older one
    assert found["then"] == ["model.safetensors"]
    assert found["same"]
    assert found["titles"] == ["Upload a sparse model", "Shards", "One file"]
    assert found["main"] == ["Upload a sparse model"]


def test_other_ways_and_architectures(done: dict[str, Any]) -> None:
    found = done["other_pushes"]
    assert found["direct"]
    assert {"config.json", "model.safetensors"} <= set(found["files"])
    assert found["roberta"]
    assert found["card made"]
    assert found["no code named"]
    assert found["code again"]


REFUSALS = {
    "wrong token": "Pushing to new needs a token that the Hub knows. Got another .*hf auth login",
    "read token": "Pushing to tester/public needs a token with the right to. Got one without",
    "foreign": "Pushing to other/model needs a token with the right to",
    "name": "Pushing to a/b/c needs what the Hub accepts",
    "public": "needs a private repository. Got tester/public, which is public",
    "tag": "`tag` must be new. Got 'v1', which tester/tagged has",
    "card": "license.*got 'none of them'",
    "missing": "tester/missing, which is no folder here, needs a repository .* Got none of that name",
    "revision": "needs a branch, tag or commit that exists. Got another: .*missing",
    "no checkpoint": "--hub_strategy checkpoint.*Got tester/big without a folder last-checkpoint",
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refused(done: dict[str, Any], case: str) -> None:
    message = done["refusals"][case]
    assert message.startswith("HubError: ")
    assert "\n" not in message
    assert re.search(REFUSALS[case], message), message


def test_loading_what_is_not_there_is_an_error(done: dict[str, Any]) -> None:
    for case in ("load missing", "load private", "load wrong token"):
        assert done["refusals"][case].startswith("OSError: tester/")
        assert "token" in done["refusals"][case]
    assert done["refusals"]["commits"] == ["Upload a sparse model"]  # none for the tag that existed


@pytest.mark.parametrize("case", ["upload", "commit", "server"])
def test_an_interrupted_push(done: dict[str, Any], case: str) -> None:
    found = done["interruptions"][case]
    assert found["error"].startswith(f"HubError: Pushing to tester/interrupted-{case} was interrupted: ")
    assert "Do the same again" in found["error"]
    assert found["before"] == []
    assert found["titles"] == ["Upload a sparse model"]
    assert found["same"]


@pytest.mark.parametrize(
    ("strategy", "titles", "folders"),
    [
        ("end", [], []),
        # The upload of the first took longer than training: the last followed.
        ("every_save", ["step 2", "step 4"], []),
        ("checkpoint", ["step 2", "step 4"], ["last-checkpoint"]),
        ("all_checkpoints", ["step 2", "step 4"], ["checkpoint-2", "checkpoint-4"]),
    ],
)
def test_hub_strategies(done: dict[str, Any], strategy: str, titles: list[str], folders: list[str]) -> None:
    found = done["strategies"][f"run-{strategy}"]
    assert found["titles"] == [*(f"Training in progress, {title}" for title in titles), "End of training"]
    inside = {f"{folder}/{name}" for folder in folders for name in (*CHECKPOINT, *MODEL)}
    assert set(found["files"]) == {*MODEL, "README.md", *inside}
    assert found["same"]
    assert set(found["left"]) == {*MODEL, "README.md", "checkpoint-4", "training_args.bin"}


def test_resume_from_the_hub_is_exact(done: dict[str, Any]) -> None:
    assert done["strategies"]["last step"] == 4
    assert done["strategies"]["newest"] == "checkpoint-4"
    found = done["resume"]
    assert found["from"] == "last-checkpoint"
    assert set(found["files"]) == {*CHECKPOINT, *MODEL}
    assert found["trained"] == 4
    assert found["same model"]
    assert found["same moments"]
    assert found["same coverage"]


def test_a_run_that_may_not_push_does_not_begin(done: dict[str, Any]) -> None:
    early = done["failing_runs"]["early"]
    assert early["hf_nobody"].startswith("HubError: Pushing to early needs a token that the Hub knows.")
    assert early["hf_read"].startswith("HubError: Pushing to early needs a token with the right to.")


def test_a_run_outlives_failed_pushes(done: dict[str, Any]) -> None:
    found = done["failing_runs"]
    for step, message in zip((2, 4), found["during"], strict=True):
        assert f"checkpoint-{step} was not pushed, and training goes on" in message
    (message,) = found["save_model"]
    assert "The model is saved: `hf_dynsparse.hub.push_folder(" in message
    assert found["saved"]
    assert found["error"] == f"HubError: {message}"
    assert found["before"] == []
    assert found["after"] == ["End of training"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "model"
    toy_model().save_pretrained(path, max_shard_size="15KB")
    toy_tokenizer().save_pretrained(path)
    return path


def test_what_a_run_leaves_stays_behind(folder: Path) -> None:
    belonging = set(model_files(folder))
    for name in (
        "optimizer.pt",
        "rng_state_0.pth",
        "training_args.bin",
        ".cache/x",
        "checkpoint-3/model.safetensors",
        "runs/events",
        "topology_history/step-1.npz",
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"\x80\x04")
    assert set(model_files(folder)) == belonging
    kept = set(checkpoint_files(folder, "last-checkpoint")) - belonging
    assert kept == {f"last-checkpoint/{name}" for name in (*belonging, "optimizer.pt", "rng_state_0.pth")}


def test_pickles_are_refused(folder: Path, tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(1)}, tmp_path / "new.pt")
    torch.save({"weight": torch.zeros(1)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    shutil.move(shutil.make_archive(str(tmp_path / "harmless"), "zip", folder), folder)
    assert "harmless.zip" in model_files(folder)
    for source, name in (("new.pt", "model.dat"), ("old.pt", "tokenizer.dat"), ("new.pt", "pytorch_model.bin")):
        shutil.copy(tmp_path / source, folder / name)
        with pytest.raises(ValueError, match=f"no pickles. Got .*{name}"):
            model_files(folder)
        (folder / name).unlink()


def test_only_whole_sparse_models_are_pushed(folder: Path, tmp_path: Path) -> None:
    check_model(folder)
    shard = next(folder.glob("*-00002-of-*.safetensors"))
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match=shard.name):
        push_folder(folder, "tester/model")
    shard.unlink()
    with pytest.raises(ValueError, match=shard.name):
        push_folder(folder, "tester/model")
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match="without config.json"):
        push_folder(folder, "tester/model")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertForMaskedLM(BertConfig(vocab_size=32, **sizes)).save_pretrained(tmp_path / "bert")
    with pytest.raises(ValueError, match="Only a sparse model can be pushed. Got .*bert, a BertForMaskedLM"):
        push_folder(tmp_path / "bert", "tester/model")


def test_offline(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="Pushing to tester/model needs the Hub. Got no connection.*HF_HUB_OFFLINE"):
        push_folder(folder, "tester/model")
    with pytest.raises(HubError, match="Resuming from runs/none, which is no folder here, needs the Hub"):
        fetch_checkpoint("runs/none")


@pytest.mark.parametrize("given", [None, "last", "{here}", "{here}/none"])
def test_what_is_no_repository_is_not_fetched(tmp_path: Path, given: str | None) -> None:
    given = given and given.format(here=tmp_path)
    assert fetch_checkpoint(given) == given
