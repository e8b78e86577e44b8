"""The Hub: a real client against a server on this machine, with the package and without; what may be pushed at all."""

import bz2
import gzip
import os
import pickle
import re
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from huggingface_hub.errors import HfHubHTTPError
from loopback import LoopbackHub, loopback_hub
from toy import toy_model, toy_tokenizer
from transformers import BertConfig, BertForMaskedLM

from hf_dynsparse.hub import HubError, fetch_checkpoint, push_checkpoint, push_folder
from hf_dynsparse.hub.errors import ask
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


def test_a_single_busy_answer_is_waited_out(done: dict[str, Any]) -> None:
    found = done["busy_moments"]
    assert found["titles"] == ["Upload a sparse model"]
    assert found["tagged"]
    assert [round(wait) for wait in found["waits"]] == [1, 2, 1, 1]  # listing files is asked again by the client


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
        "report.html",
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"\x80\x04")
    assert set(model_files(folder)) == belonging
    kept = set(checkpoint_files(folder, "last-checkpoint")) - belonging
    assert kept == {f"last-checkpoint/{name}" for name in (*belonging, "optimizer.pt", "rng_state_0.pth")}


def test_pickles_are_refused(folder: Path, tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(1)}, tmp_path / "new.pt")
    torch.save({"weight": torch.zeros(1)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    contents = [file.read_bytes() for file in tmp_path.iterdir() if file.is_file()]
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        pickled = pickle.dumps({"weight": print}, protocol)
        contents += [pickled, gzip.compress(pickled), zlib.compress(pickled), bz2.compress(pickled)]
    names = ("model.dat", "pytorch_model.bin", "x.pkl", "x.zip", "x.npy", "no_suffix")
    safe = ("adapter.safetensors", "tokenizer.json", "notes.txt", "x.py", "x.png", "x.gif", "spiece.model", "x.onnx")
    for content in contents:
        for name in (*names[: 1 if content is not contents[0] else None], *safe):
            kept = (folder / name).read_bytes() if (folder / name).exists() else None
            (folder / name).write_bytes(content)
            with pytest.raises(ValueError, match=f"no pickles. Got .*{name}, .* Remove it") as refused:
                model_files(folder)
            assert "\n" not in str(refused.value)
            (folder / name).unlink()
            if kept is not None:
                (folder / name).write_bytes(kept)


def test_what_belongs_to_a_model_is_pushed(folder: Path) -> None:
    belonging = {
        "README.md": "1. First\n2. N.B. it ends with a dot.\n",
        "vocab.txt": "(\n.\nN.\n]\n",
        "merges.txt": "#version: 0.2\nĠ t\n",
        "log/train.log": "\x1b[31mred\x1b[0m\n",
        "chat_template.jinja": "{{ messages }}",
        "extra.json": "[]",
        "LICENSE": "Do what you like.",
        "empty.txt": "",
    }
    pictures = {
        "a.png": b"\x89PNG\r\n\x1a\n",
        "topology.gif": b"GIF89a",
        "spiece.model": b"\n\x0e",
        "m.onnx": b"\x08\x0a",
    }
    (folder / "log").mkdir()
    for name, text in belonging.items():
        (folder / name).write_text(text)
    for name, content in pictures.items():
        (folder / name).write_bytes(content)
    assert {*belonging, *pictures} <= model_files(folder).keys()


@pytest.mark.parametrize("state", [False, True])
def test_only_regular_files_and_links_that_stay_inside(
    folder: Path, tmp_path: Path, state: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pipe is not opened: that would wait for ever."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    name = "optimizer.pt" if state else "notes.txt"
    secret, cached = tmp_path / "secret.txt", tmp_path / "cache" / "models--a--b" / "blobs" / "0"
    cached.parent.mkdir(parents=True)
    for file in (secret, cached, folder / "inside.txt", folder / ".hidden"):
        file.write_text("text")

    def files() -> dict[str, Any]:
        return checkpoint_files(folder, "last") if state else model_files(folder)

    def link(target: Path) -> None:
        (folder / name).symlink_to(target)

    refused = {
        "outside": lambda: link(secret),
        "outside by another link": lambda: (folder / ".link").symlink_to(secret) or link(folder / ".link"),
        "to nothing": lambda: link(folder / "missing"),
        "to itself": lambda: link(folder / name),
        "to a folder": lambda: link(folder),
        "to the device": lambda: link(Path("/dev/zero")),
        "a pipe": lambda: os.mkfifo(folder / name),
    }
    if not state:  # what stays behind is not let in by another name
        refused["to what stays behind"] = lambda: link(folder / ".hidden")
    for case, make in refused.items():
        make()
        with pytest.raises(ValueError, match=rf"Only regular files may be pushed, .* Got {folder / name}, ") as error:
            files()
        assert "\n" not in str(error.value), case
        (folder / name).unlink()
    for target in (folder / "inside.txt", Path("inside.txt"), cached):
        link(target)
        assert any(path.endswith(name) for path in files())
        (folder / name).unlink()


def test_a_folder_of_the_cache_may_be_pushed(folder: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "elsewhere" / "models--a--b" / "snapshots" / "0"
    (snapshot.parents[1] / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(folder.iterdir())):
        shutil.copy(file, snapshot.parents[1] / "blobs" / str(number))
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", str(number)))
    assert model_files(snapshot).keys() == model_files(folder).keys()


def test_a_checkpoint_is_pushed_from_what_it_is(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("text")
    (folder / "notes.txt").symlink_to(secret)
    about: dict[str, Any] = {"subfolder": None, "message": "", "revision": None, "token": None}
    push_checkpoint(folder, "tester/model", **about).result()
    assert f"{folder} was not pushed, and training goes on" in caplog.text
    assert "notes.txt, a link to" in caplog.text
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["model"]


def test_a_pipe_in_the_place_of_a_model_is_not_waited_for(folder: Path) -> None:
    for name in ("config.json", next(folder.glob("*.safetensors")).name):
        (folder / name).unlink()
        os.mkfifo(folder / name)
        with pytest.raises(ValueError, match=rf"Only regular files may be pushed.* Got {folder}"):
            push_folder(folder, "tester/model")


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


def test_only_numbered_checkpoints_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What else a repository has of that name is passed over."""
    monkeypatch.setattr("hf_dynsparse.hub.fetch.snapshot_download", lambda *args, **kwargs: str(tmp_path))
    for name in ("checkpoint-abc", "checkpoint-", "checkpoint-9-old", "checkpoint-²"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "trainer_state.json").write_text("{}")
    with pytest.raises(HubError, match="Got tester/model without a folder last-checkpoint"):
        fetch_checkpoint("tester/model")
    for step in (9, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
    assert fetch_checkpoint("tester/model") == str(tmp_path / "checkpoint-10")


def busy(status: int, **headers: str) -> HfHubHTTPError:
    response: Any = SimpleNamespace(status_code=status, headers=headers, request=SimpleNamespace(headers={}))
    return HfHubHTTPError("busy", response=response)


@pytest.mark.parametrize(
    ("errors", "waits"),
    [
        ([busy(429, **{"retry-after": "7"})], [7]),
        ([busy(429, ratelimit='"api";r=0;t=41')], [42]),
        ([busy(503), busy(429)], [1, 4]),
        ([busy(429, **{"retry-after": "86400"})], [301]),
    ],
)
def test_a_busy_hub_is_asked_again(errors: list[Exception], waits: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[int] = []
    monkeypatch.setattr("hf_dynsparse.hub.errors.time.sleep", slept.append)

    def request() -> str:
        if errors_left:
            raise errors_left.pop(0)
        return "done"

    errors_left = list(errors)
    assert ask("Pushing", request) == "done"
    assert slept == waits
    errors_left = [busy(429) for _ in range(9)]
    with pytest.raises(HubError, match="Pushing was interrupted"):
        ask("Pushing", request)
    assert len(errors_left) == 5
    errors_left = [busy(500)]
    with pytest.raises(HubError, match="Pushing was interrupted"):
        ask("Pushing", request)


@pytest.mark.parametrize("given", [None, "last", "{here}", "{here}/none"])
def test_what_is_no_repository_is_not_fetched(tmp_path: Path, given: str | None) -> None:
    given = given and given.format(here=tmp_path)
    assert fetch_checkpoint(given) == given
