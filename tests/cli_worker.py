"""
Someone with an account who uses the command: `cli_worker.py REPORT.json FOLDER`, with `HF_ENDPOINT` set to the
loopback Hub.
"""

import io
import json
import re
import shutil
import sys
import urllib.request
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, constants
from toy import toy_model, toy_tokenizer
from transformers import AutoTokenizer, BertForMaskedLM

from hf_dynsparse import DynSparseBertConfig, DynSparseBertForMaskedLM, inspect_checkpoint
from hf_dynsparse.checkpoints import loading as saved_model
from hf_dynsparse.hub import push_folder
from hf_dynsparse_cli import main


FOLDER = Path(sys.argv[2])


def command(*arguments: Any) -> list[Any]:
    """Its exit status, what it prints, and the last line of its errors."""
    out, err = io.StringIO(), io.StringIO()
    status: Any = 0
    with redirect_stdout(out), redirect_stderr(err):
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as ended:
            status = ended.code
    return [status, out.getvalue(), err.getvalue().strip().splitlines()[-1:] if status else []]


def fetched_bytes() -> int:
    """Of weights, since the last call, by the ranges that were asked for."""
    with urllib.request.urlopen(f"{constants.ENDPOINT}/_test/log?clear=1") as log:
        requests = json.load(log)
    asked = [request for request in requests if request["method"] == "GET" and "safetensors" in request["path"]]
    ranges = [
        re.fullmatch(r"bytes=(\d+)-(\d+)", value)
        for request in asked
        if request["status"] in (200, 206)
        for name, value in request["headers"].items()
        if name.lower() == "range"
    ]
    return sum(int(found[2]) - int(found[1]) + 1 for found in ranges if found)


def look_while_it_moves() -> tuple[list[int], int]:
    """
    Status, and layers that are found in a repository to which another model is pushed between its configuration and
    its weights, and while it is converted; and the layers that are found afterwards.
    """
    for name, layers in (("old", 2), ("new", 4)):
        toy_model(num_hidden_layers=layers).save_pretrained(FOLDER / name)
    push_folder(FOLDER / "old", "moving")
    read = saved_model.read_object

    def read_and_push(*args: Any) -> Any:
        saved_model.read_object = read
        content = read(*args)
        push_folder(FOLDER / "new", "moving")
        return content

    saved_model.read_object = read_and_push
    status = command("inspect", "tester/moving", "--json", FOLDER / "moving.json")[0]
    found = [len(json.loads((FOLDER / "moving.json").read_text())["layers"])]
    push_folder(FOLDER / "old", "moving")
    saved_model.read_object = read_and_push
    found.append(6 * saved_model.load_model("tester/moving").config.num_hidden_layers)
    moved = len(inspect_checkpoint("tester/moving").layers)
    for name in ("old", "new"):
        shutil.rmtree(FOLDER / name)
    (FOLDER / "moving.json").unlink()
    return [status, *found], moved


def report() -> dict[str, Any]:
    """Push, look, and convert from there."""
    model = DynSparseBertForMaskedLM(DynSparseBertConfig.preset("mini", vocab_size=8192)).eval()
    model.save_pretrained(FOLDER / "mini")
    toy_tokenizer().save_pretrained(FOLDER / "mini")
    options = ["--private", "--tag", "v1", "--message", "By command"]
    pushed = command("push", FOLDER / "mini", "mini", *options, "--with_code")
    info = HfApi().model_info("tester/mini", revision="v1")
    draft = command("push", FOLDER / "mini", "tester/mini", "--revision", "draft")
    fetched_bytes()
    inspected = command("inspect", "tester/mini@v1", "--json", FOLDER / "report.json")
    fetched = fetched_bytes()
    local = command("inspect", FOLDER / "mini", "--json", FOLDER / "local.json")
    moving, moved = look_while_it_moves()
    converted = command("convert", "tester/mini@v1", FOLDER / "dense", "--to", "dense")
    ids = torch.arange(5, 13)[None]
    dense = BertForMaskedLM.from_pretrained(FOLDER / "dense")
    toy_model().to_dense().save_pretrained(FOLDER / "stock")
    reports = [json.loads((FOLDER / name).read_text()) | {"source": ""} for name in ("report.json", "local.json")]
    return {
        "pushed": pushed,
        "private": info.private,
        "files": sorted(file.rfilename for file in info.siblings or ()),
        "title": HfApi().list_repo_commits("tester/mini", revision="v1")[0].title,
        "sha": info.sha,
        "draft": draft[0],
        "branches": sorted(branch.name for branch in HfApi().list_repo_refs("tester/mini").branches),
        "inspected": [inspected[0], local[0]],
        "same": reports[0] == reports[1],
        "bytes": reports[0]["bytes"],
        "fetched": fetched,
        "moving": moving,
        "moved": moved,
        "converted": converted,
        "logits": torch.equal(dense(ids).logits, model.to_dense()(ids).logits),
        "tokenizer": AutoTokenizer.from_pretrained(FOLDER / "dense").get_vocab() == toy_tokenizer().get_vocab(),
        "missing": command("inspect", "tester/missing"),
        "revision": command("convert", "tester/mini@v9", FOLDER / "v9", "--to", "dense"),
        "foreign": command("push", FOLDER / "mini", "other/mini"),
        "dense": command("push", FOLDER / "stock", "stock"),
        "left": sorted(path.name for path in FOLDER.iterdir()),
    }


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(report()))
