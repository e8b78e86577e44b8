"""
The Python of README.md and docs/, run: all blocks of a page one after the other, in an empty folder, with toys in the
place of models and data. `SMALLER` says what is replaced, `NOT_RUN` which blocks are left out, and why.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.optim.swa_utils import get_ema_multi_avg_fn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    RobertaConfig,
    RobertaForMaskedLM,
)

import hf_dynsparse
from hf_dynsparse import DynSparseBertForSequenceClassification, sparse_layers
from hf_dynsparse.models.auto import load_pretrained
from tests.toy import TOY_SIZES, toy_batch, toy_collator, toy_examples, toy_model, toy_tokenizer, toy_trainer


ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
BLOCKS = {
    page.stem: BLOCK.findall(page.read_text(encoding="utf-8"))
    for page in [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
}
SIZES = {name: TOY_SIZES[name] for name in ("hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")}
SIZES |= {"num_hidden_layers": 2, "max_position_embeddings": 32}

SMALLER = {
    r'"runs/tiny-s90-b8"': "trainer.args.output_dir",
    r"\(model, args, train_dataset=train, callbacks=": "(dense_classifier, args, train_dataset=sst2, callbacks=",
    r'"train.txt.gz"': "text",
    r"\.validate\(\)": "",  # asks the Hub
    r'"(bert-base-uncased|gpt2|FacebookAI/roberta-base|Intel/[\w-]+|small|runs/[\w-]+)"(?=[,)])': r'saved("\1")',
    r'TrainingArguments\("(out|runs/llama)"': r"\g<0>, **quiet",
    r'preset\("medium"': r'preset("tiny", **sizes',
    r"_steps=[\d_]+": "_steps=4",
    r"max_seq_length=128": "max_seq_length=32",
    r"_updates=[1-9]\d+": "_updates=1",
    r"from_config\(config\)": "from_config(saved_config)",
    r"ModernBertConfig\(.*?\)": "ModernBertConfig(**sizes, **special)",
    r"range\(8\)\] \* 12": "range(1)] * 2",
    r"range\(1840\)\] \* 12": "range(48)] * 2",
    r"heads=1 / 3": "heads=1 / 2",
}
RANKS = "needs several ranks: tests/training/test_fsdp.py"
HUB = "needs a Hub: tests/hub/test_hub.py"
NOT_RUN: dict[str, dict[int, str]] = {
    "api": {5: "needs SQuAD, and logits that … stands for: tests/data, tests/examples"},
    "command_line": {0: HUB},
    "export": {1: "takes ten seconds: tests/checkpoints/test_export.py"},
    "hub": {0: HUB, 1: HUB, 2: HUB, 3: "needs `kernels`: tests/ops/test_triton.py"},
    "make_it_sparse": {1: "needs sentence-transformers"},
    "many_processes": {0: RANKS},
    "monitoring": {0: "needs two runs: tests/reports", 1: "… stands for the arguments of a Trainer"},
    "plugins": {0: "is examples/plugins/fresh_gradient.py, which a later block imports"},
    "study": {0: "needs the runs of a study: tests/examples"},
}


def beginning(folder: Path) -> dict[str, Any]:
    """What pages take for granted: imports, a model, its data, and what `SMALLER` speaks of."""
    bert, dense_classifier = (BertForSequenceClassification(BertConfig(**SIZES)) for _ in range(2))
    kinds: dict[str, Callable[[], PreTrainedModel]] = {
        "gpt2": lambda: GPT2LMHeadModel(
            GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=SIZES["vocab_size"], n_positions=32)
        ),
        "FacebookAI/roberta-base": lambda: RobertaForMaskedLM(RobertaConfig(**SIZES)),
        "Intel/bert-base-uncased-sparse-90-unstructured-pruneofa": lambda: toy_model().to_dense(),
        "runs/medium-s90-b16": toy_model,
        **dict.fromkeys(
            ("runs/sst2-locked", "runs/reviews"), lambda: toy_model(cls=DynSparseBertForSequenceClassification)
        ),
    }

    def saved(name: str) -> str:
        if not (path := folder / "saved" / name).exists():
            model = kinds.get(name, lambda: BertForMaskedLM(BertConfig(**SIZES)))()
            model.save_pretrained(path)
            toy_tokenizer().save_pretrained(path)
        return str(path)

    special = {f"{name}_token_id": i for i, name in enumerate(("pad", "unk", "cls", "sep", "mask")) if name != "unk"}
    special |= {"bos_token_id": None, "eos_token_id": None}
    text = folder / "text.txt"
    text.write_text("w1 w2 w3 w4 w5 w6 w7\n" * 200)
    model, trainer = toy_model(), toy_trainer(folder / "run")
    return {
        **{name: getattr(hf_dynsparse, name) for name in hf_dynsparse.__all__},
        **{name: getattr(transformers, name) for name in dir(transformers) if name.startswith("AutoModelFor")},
        "BertForSequenceClassification": BertForSequenceClassification,
        "TrainerCallback": transformers.TrainerCallback,
        "get_ema_multi_avg_fn": get_ema_multi_avg_fn,
        "hf_dynsparse": hf_dynsparse,
        "load_pretrained": load_pretrained,
        "torch": torch,
        # of SMALLER
        "dense_classifier": dense_classifier,
        "quiet": {"disable_tqdm": True, "use_cpu": True, "report_to": []},
        "saved": saved,
        "saved_config": RobertaConfig(**SIZES),
        "sizes": SIZES,
        "special": special,
        "sst2": [row | {"labels": row["input_ids"][1] % 2} for row in toy_examples(24)],
        # models and their parts
        "bert": bert,
        "early_model": bert,
        "model": model,
        "sparse_model": toy_model(1),
        "teacher": toy_model(2, DynSparseBertForSequenceClassification),
        "layer": next(iter(sparse_layers(model).values())),
        "optimizer": torch.optim.AdamW(model.parameters()),
        "heads": [[0]] * 2,
        "neurons": [range(48)] * 2,
        "head_gates": [torch.ones(2)] * 2,
        "neuron_gates": [torch.ones(64)] * 2,
        # data
        "args": trainer.args,
        "batches": [toy_batch(), toy_batch()],
        "collator": toy_collator(),
        "hidden": torch.ones(3, 32),
        "inputs": dict(toy_tokenizer()("w1", return_tensors="pt")),
        "text": str(text),
        "texts": [f"w{i % 44} w{i % 41} w{i % 43} w{i % 37}" for i in range(512)],
        "tokenizer": toy_tokenizer(),
        "train": toy_examples(24),
        "trainer": trainer,
    }


@pytest.mark.filterwarnings("ignore:Sparse BSR tensor support is in beta state:UserWarning")
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT reads it
@pytest.mark.parametrize("page", [page for page, blocks in BLOCKS.items() if len(NOT_RUN.get(page, {})) < len(blocks)])
def test_blocks_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(ROOT / "examples" / "plugins")
    if any("from peft " in block for block in BLOCKS[page]):
        pytest.importorskip("peft")
    names = beginning(tmp_path)
    left_out = NOT_RUN.get(page, {})
    assert left_out.keys() <= {*range(len(BLOCKS[page]))}
    for number, block in enumerate(BLOCKS[page]):
        if number not in left_out:
            for pattern, toy in SMALLER.items():
                block = re.sub(pattern, toy, block)
            exec(compile(block, f"{page}.md, block {number}", "exec"), names)
