"""
A user of the Hub who has this package: `hub_worker.py REPORT.json FOLDER`, with `HF_ENDPOINT` set to the loopback Hub.

Every step of `STEPS` is run, and what it returns is reported under its name.
"""

import json
import logging
import os
import shutil
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, ModelCard, constants
from toy import toy_arguments, toy_batch, toy_collator, toy_examples, toy_model, toy_tokenizer
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    RobertaConfig,
    RobertaForMaskedLM,
    TrainerCallback,
)

from hf_dynsparse import DynSparseTrainer, save_with_code, sparsify_
from hf_dynsparse.hub import fetch_checkpoint, push_folder


API = HfApi()
FOLDER = Path(sys.argv[2])
STEPS: list[Callable[[], Any]] = []


def step(function: Callable[[], Any]) -> Callable[[], Any]:
    """Have `function` run and reported."""
    STEPS.append(function)
    return function


def fault(**spec: Any) -> None:
    """Make requests fail: see hub_server/README.md."""
    request = urllib.request.Request(f"{constants.ENDPOINT}/_test/fault", json.dumps(spec).encode(), method="POST")
    urllib.request.urlopen(request).read()


def error_of(function: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    """Class and message of the error that it ends with."""
    try:
        function(*args, **kwargs)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def same(model: Any, other: Any) -> bool:
    """Whether two models have the same tensors, bit for bit."""
    theirs = other.state_dict()
    return model.state_dict().keys() == theirs.keys() and all(
        tensor.dtype == theirs[name].dtype and torch.equal(tensor, theirs[name])
        for name, tensor in model.state_dict().items()
    )


def titles(repo_id: str, revision: str | None = None) -> list[str]:
    """Of the commits, oldest first, without that which made the repository."""
    return [commit.title for commit in API.list_repo_commits(repo_id, revision=revision)][-2::-1]


def files(repo_id: str, revision: str | None = None) -> list[str]:
    """What is in it, without .gitattributes."""
    return sorted(set(API.list_repo_files(repo_id, revision=revision)) - {".gitattributes"})


def big_model(seed: int = 0) -> Any:
    """More than 10 MB: the Hub takes it as a large file, by another route."""
    return toy_model(seed, hidden_size=512, intermediate_size=2048, block_size=16, sparsity=0.5, vocab_size=64)


def trainer(name: str, callbacks: Any = (), **overrides: Any) -> DynSparseTrainer:
    """Four steps with dropout, a checkpoint at every second; only the last is kept."""
    arguments = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "save_total_limit": 1, "push_to_hub": True}
    return DynSparseTrainer(
        toy_model(hidden_dropout_prob=0.1),
        toy_arguments(FOLDER / name, **{**arguments, "num_topology_updates": 2, **overrides}),
        data_collator=toy_collator(),
        train_dataset=toy_examples(24),
        processing_class=toy_tokenizer(),
        callbacks=list(callbacks),
    )


@step
def push_and_load() -> Any:
    model, folder = big_model(), FOLDER / "big"
    model.save_pretrained(folder)
    toy_tokenizer().save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\ntags: [dynsparse]\n---\n# A card\n")
    torch.save({"moments": torch.zeros(1)}, folder / "optimizer.pt")
    torch.save({}, folder / "training_args.bin")
    commit = push_folder(folder, "big", private=True, tag="v1", with_code=True)
    again = push_folder(folder, "big", private=True, with_code=True)
    loaded = AutoModelForMaskedLM.from_pretrained("tester/big", revision="v1", cache_dir=FOLDER / "cache")
    words = AutoTokenizer.from_pretrained("tester/big", cache_dir=FOLDER / "cache")
    head = AutoModelForSequenceClassification.from_pretrained("tester/big", cache_dir=FOLDER / "cache")
    info = API.model_info("tester/big", revision="v1", files_metadata=True)
    inputs = {name: toy_batch()[name] for name in ("input_ids", "attention_mask")}
    outputs = model.eval()(**inputs, output_hidden_states=True)
    outputs.hidden_states[-1].square().sum().backward()
    answers = {
        "inputs": inputs,
        "outputs": outputs.logits.detach(),
        "gradients": {name: p.grad for name, p in model.named_parameters() if p.grad is not None},
        "state": model.state_dict(),
    }
    torch.save({"AutoModelForMaskedLM": answers}, FOLDER / "answers.pt")
    return {
        "bytes": (folder / "model.safetensors").stat().st_size,
        "route": {file.rfilename: "lfs" if file.lfs else "regular" for file in info.siblings or ()},
        "files": files("tester/big"),
        "private": info.private,
        "license": info.card_data["license"],
        "tagged": info.sha == commit.oid == again.oid,
        "titles": titles("tester/big"),
        "same": same(model, loaded),
        "head": type(head).__name__,
        "trained head kept": same(model.bert.encoder, head.bert.encoder),
        "tokenizer": words.get_vocab() == toy_tokenizer().get_vocab(),
        "entries": sum(parameter.numel() for parameter in model.parameters()),
        "changed here": "auto_map" in (folder / "config.json").read_text(),
    }


@step
def shards() -> Any:
    model, folder = toy_model(seed=1), FOLDER / "shards"
    model.save_pretrained(folder, max_shard_size="15KB")
    push_folder(folder, "tester/big", revision="dev", tag="v2", commit_message="Shards")
    model.save_pretrained(FOLDER / "whole")
    dev = files("tester/big", "dev")
    loaded = AutoModelForMaskedLM.from_pretrained("tester/big", revision="dev", cache_dir=FOLDER / "cache")
    push_folder(FOLDER / "whole", "tester/big", revision="dev", commit_message="One file")
    return {
        "shards": [name for name in dev if name.endswith((".safetensors", ".index.json"))],
        "then": [name for name in files("tester/big", "dev") if name.endswith((".safetensors", ".index.json"))],
        "same": same(model, loaded),
        "titles": titles("tester/big", "dev"),
        "main": titles("tester/big"),
        "card": ModelCard.load("tester/big").data.tags,
    }


@step
def other_pushes() -> Any:
    model = toy_model()
    model.push_to_hub("direct", private=True, commit_message="By transformers")
    direct = AutoModelForMaskedLM.from_pretrained("tester/direct", cache_dir=FOLDER / "cache")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    roberta = sparsify_(RobertaForMaskedLM(RobertaConfig(vocab_size=32, **sizes)), block_size=4, sparsity=0.5)
    roberta.save_pretrained(FOLDER / "roberta")
    push_folder(FOLDER / "roberta", "roberta")
    stock = AutoModelForMaskedLM.from_pretrained("tester/roberta", cache_dir=FOLDER / "cache")
    card = ModelCard.load("tester/roberta")
    # A model that came with its code, and is saved without: what its configuration names must not be missing.
    plain = AutoModelForMaskedLM.from_pretrained("tester/big", revision="v1")
    plain.save_pretrained(FOLDER / "plain")
    save_with_code(plain, FOLDER / "named")
    (FOLDER / "named" / "modeling_dynsparse_bert.py").unlink()
    push_folder(FOLDER / "named", "named")
    return {
        "direct": same(model, direct),
        "files": files("tester/direct"),
        "roberta": same(roberta, stock),
        "card made": "hf_dynsparse" in card.text,
        "no code named": "auto_map" not in (FOLDER / "plain" / "config.json").read_text(encoding="utf-8"),
        "code again": "modeling_dynsparse_bert.py" in files("tester/named"),
    }


@step
def refusals() -> Any:
    folder = FOLDER / "whole"
    API.create_repo("tester/public", private=False)
    push_folder(folder, "tester/tagged", tag="v1")
    bad_card = shutil.copytree(FOLDER / "roberta", FOLDER / "bad-card")
    (bad_card / "README.md").write_text("---\nlicense: none of them\n---\n")
    (folder / "README.md").write_text("changed")
    return {
        "wrong token": error_of(push_folder, folder, "new", token="hf_nobody"),
        "read token": error_of(push_folder, folder, "tester/public", token="hf_read"),
        "foreign": error_of(push_folder, folder, "other/model"),
        "name": error_of(push_folder, folder, "a/b/c"),
        "public": error_of(push_folder, folder, "tester/public", private=True),
        "tag": error_of(push_folder, folder, "tester/tagged", tag="v1"),
        "card": error_of(push_folder, bad_card, "bad-card"),
        "missing": error_of(fetch_checkpoint, "tester/missing"),
        "revision": error_of(fetch_checkpoint, "tester/big@missing"),
        "no checkpoint": error_of(fetch_checkpoint, "tester/big"),
        "load missing": error_of(AutoModelForMaskedLM.from_pretrained, "tester/missing"),
        "load private": error_of(AutoModelForMaskedLM.from_pretrained, "tester/big", token="hf_other"),
        "load wrong token": error_of(AutoModelForMaskedLM.from_pretrained, "tester/big", token="hf_nobody"),
        "commits": titles("tester/tagged"),
    }


@step
def interruptions() -> Any:
    from huggingface_hub.utils import _http

    waits: list[float] = []
    patient, _http.time.sleep = _http.time.sleep, waits.append  # the client waits 23 s in all before it gives up
    found = {}
    for name, spec in {
        "upload": {"method": "PUT", "path": "/lfs/", "after": 1_000_000, "times": 6},
        "commit": {"method": "POST", "path": "/commit/", "drop": True},
        "server": {"method": "POST", "path": "/commit/", "status": 500},
    }.items():
        model, folder = big_model(seed=1) if name == "upload" else toy_model(seed=2), FOLDER / f"interrupted-{name}"
        model.save_pretrained(folder)
        fault(**spec)
        error = error_of(push_folder, folder, f"interrupted-{name}")
        before = files(f"tester/interrupted-{name}")
        push_folder(folder, f"interrupted-{name}", tag="v1")
        repo_id = f"tester/interrupted-{name}"
        loaded = AutoModelForMaskedLM.from_pretrained(repo_id, revision="v1", cache_dir=FOLDER / "cache")
        found[name] = {"error": error, "before": before, "titles": titles(repo_id), "same": same(model, loaded)}
    _http.time.sleep = patient
    return {**found, "waits": len(waits)}


@step
def busy_moments() -> Any:
    from hf_dynsparse.hub import errors

    waits: list[float] = []
    patient, errors.time.sleep = errors.time.sleep, waits.append  # type: ignore[assignment]
    model, folder = toy_model(seed=4), FOLDER / "busy"
    model.save_pretrained(folder)
    for method, path in (("POST", "/repos/create"), ("GET", "/tree/"), ("POST", "/commit/"), ("POST", "/tag/")):
        fault(method=method, path=path, status=429)
    push_folder(folder, "busy", tag="v1")
    errors.time.sleep = patient
    tags = [tag.name for tag in API.list_repo_refs("tester/busy").tags]
    return {"titles": titles("tester/busy"), "tagged": tags == ["v1"], "waits": waits}


@step
def strategies() -> Any:
    found = {}
    for strategy in ("end", "every_save", "checkpoint", "all_checkpoints"):
        name = f"run-{strategy}"
        # One upload that outlasts the run: its files must not go with their checkpoint, which is rotated away.
        fault(method="POST", path=f"/tester/{name}/preupload/", delay=0.5)
        run = trainer(
            name, hub_strategy=strategy, hub_always_push=strategy == "all_checkpoints", hub_private_repo=True
        )
        run.train()
        run.push_to_hub()
        pushed = AutoModelForMaskedLM.from_pretrained(f"tester/{name}", cache_dir=FOLDER / "cache")
        found[name] = {
            "titles": titles(f"tester/{name}"),
            "files": files(f"tester/{name}"),
            "same": same(run.model.eval(), pushed),
            "left": sorted(path.name for path in (FOLDER / name).iterdir()),
        }
    state = Path(fetch_checkpoint("tester/run-checkpoint")) / "trainer_state.json"
    newest = Path(fetch_checkpoint("tester/run-all_checkpoints")).name
    return {**found, "last step": json.loads(state.read_text())["global_step"], "newest": newest}


class StopAfter(TrainerCallback):
    """Ends training early."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step == self.steps


@step
def resume() -> Any:
    straight = trainer("straight", push_to_hub=False)
    straight.train()
    trainer("stopped", [StopAfter(3)], hub_strategy="checkpoint", hub_private_repo=True).train()
    shutil.rmtree(FOLDER / "stopped")
    resumed = trainer("resumed", push_to_hub=False)
    checkpoint = fetch_checkpoint("tester/stopped@main")
    resumed.train(resume_from_checkpoint=checkpoint)
    moments = [run.optimizer.state_dict()["state"] for run in (straight, resumed)]
    return {
        "from": Path(str(checkpoint)).name,
        "files": sorted(os.listdir(str(checkpoint))),
        "trained": resumed.state.global_step,
        "same model": same(straight.model, resumed.model),
        "same moments": all(
            torch.equal(tensor, moments[1][number][name])
            for number, state in moments[0].items()
            for name, tensor in state.items()
        ),
        "same coverage": straight.topology.metrics == resumed.topology.metrics,
    }


@step
def failing_runs() -> Any:
    log: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: log.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("hf_dynsparse").addHandler(handler)
    early = {token: error_of(trainer, "early", hub_token=token) for token in ("hf_nobody", "hf_read")}
    run = trainer("late", hub_strategy="every_save", hub_always_push=True, save_total_limit=None)
    # Two checkpoints, "Model save", and "End of training".
    fault(method="POST", path="/tester/late/commit/", status=500, times=4)
    run.train()
    during = len(log)
    run.save_model()
    saved = (FOLDER / "late" / "model.safetensors").is_file()
    error = error_of(run.push_to_hub)
    before = titles("tester/late")
    run.push_to_hub()
    return {
        "early": early,
        "during": log[:during],
        "save_model": log[during:],
        "saved": saved,
        "error": error,
        "before": before,
        "after": titles("tester/late"),
    }


def main() -> None:
    """Run all steps."""
    Path(sys.argv[1]).write_text(json.dumps({function.__name__: function() for function in STEPS}))


if __name__ == "__main__":
    main()
