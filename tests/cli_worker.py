"""
Someone with an account who uses the command: `cli_worker.py REPORT.json FOLDER`, with `HF_ENDPOINT` set to the
loopback Hub.
"""

import io
import json
import re
import sys
import urllib.request
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, constants
from toy import toy_model, toy_tokenizer
from transformers import AutoTokenizer, BertForMaskedLM

from hf_dynsparse import DynSparseBertConfig, DynSparseBertForMaskedLM
from hf_dynsparse.cli import main


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
