"""Model cards: every figure is that of the model or the run, examples run, and the Hub takes the metadata."""

import inspect
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import (
    AutoModelForMaskedLM,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    RobertaConfig,
    RobertaForMaskedLM,
)

from hf_dynsparse import (
    DynSparseBertForMaskedLM,
    DynSparseBertForMultipleChoice,
    DynSparseBertForPreTraining,
    DynSparseBertForQuestionAnswering,
    DynSparseBertForSequenceClassification,
    DynSparseBertForTokenClassification,
    DynSparseBertModel,
    DynSparseTrainer,
    densify_,
    inference_flops_per_sequence,
    sparse_layers,
    sparsify_,
)
from hf_dynsparse.checkpoints.loading import empty_model
from hf_dynsparse.reports.facts import checkpoint_bytes, dense_bytes, describe_data, describe_start
from hf_dynsparse.reports.model_card import write_model_card
from hf_dynsparse.training.summary import summarize_run
from tests.reports.cards import CARDS, GOLDEN
from tests.toy import toy_arguments, toy_collator, toy_model, toy_tokenizer, toy_trainer


ROOT = Path(__file__).parents[2]
HUB_SERVER = ROOT / "tests" / "hub_server" / "hub_server.py"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What run_mlm_dynsparse.py leaves, but for pictures that show something. Not to be changed."""
    folder = tmp_path_factory.mktemp("runs") / "toy-s75-b4"
    trainer = toy_trainer(folder, eval_strategy="steps", eval_steps=4, save_strategy="steps", save_steps=8)
    trainer.train()
    metrics = trainer.evaluate()
    trainer.save_model()
    toy_tokenizer().save_pretrained(folder)
    about = {"start": None, "pattern": "uniformly random blocks", "data": {"name": "words.txt", "split": "validation"}}
    summary = about | {"license": "mit", "language": "en"} | summarize_run(trainer, metrics, seq_len=16)
    (folder / "summary.json").write_text(json.dumps(summary))
    for picture in ("training.png", "block_map.png"):
        (folder / picture).write_bytes(picture.encode())
    trainer.create_model_card()
    return folder


def tiny_roberta() -> RobertaForMaskedLM:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return RobertaForMaskedLM(RobertaConfig(vocab_size=64, max_position_embeddings=40, **sizes))


def tiny_gpt2() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=32, eos_token_id=0))


def tiny_distilbert() -> DistilBertForSequenceClassification:
    return DistilBertForSequenceClassification(
        DistilBertConfig(vocab_size=64, dim=32, hidden_dim=64, n_layers=2, n_heads=2)
    )


def save(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    toy_tokenizer().save_pretrained(folder)
    return folder


def card_of(folder: Path) -> ModelCard:
    return ModelCard.load(folder / "README.md")


def tables(text: str) -> dict[tuple[str, ...], list[list[str]]]:
    """The rows of every table, by its columns."""
    found: dict[tuple[str, ...], list[list[str]]] = {}
    for block in re.findall(r"(?:^\|.*\n?)+", text, re.MULTILINE):
        columns, _, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in block.strip().splitlines()]
        assert all(len(row) == len(columns) for row in rows)
        found[tuple(columns)] = rows
    return found


@pytest.mark.parametrize("with_model", [True, False])
def test_the_folder_alone_gives_the_same_card(finished: Path, tmp_path: Path, with_model: bool) -> None:
    model = AutoModelForMaskedLM.from_pretrained(finished) if with_model else None
    again = write_model_card(finished, tmp_path / "cards" / "again", model=model)
    assert again.read_text() == (finished / "README.md").read_text()
    assert {path.name for path in again.parent.iterdir()} == {"README.md", "training.png", "block_map.png"}
    assert (again.parent / "training.png").read_bytes() == b"training.png"


def test_size_and_flops(finished: Path) -> None:
    model, twin = AutoModelForMaskedLM.from_pretrained(finished), toy_model(sparsity=0)
    summary = json.loads((finished / "summary.json").read_text())
    share = {
        "parameters": (model.num_parameters(), twin.num_parameters()),
        "MB of the checkpoint": (checkpoint_bytes(finished) / 1e6, dense_bytes(model) / 1e6),
        "MB of its sparse matrices": (2 * 2 * 4096 * 17 / 16 / 1e6, 2 * 8192 * 4 / 1e6),
        "FLOPs of a forward pass, 16 tokens": tuple(inference_flops_per_sequence(x, 16) for x in (model, twin)),
        "FLOPs of the training": (summary["flops"], summary["dense_flops"]),
    }
    rows = tables(card_of(finished).text)["quantity", "this model", "with dense layers", "share"]
    assert [row[0] for row in rows] == list(share)
    for (what, ours, dense, part), expected in zip(rows, share.values(), strict=True):
        shown = [float(number.replace(",", "")) for number in (ours, dense)]
        assert shown == pytest.approx(expected, rel=1e-3, abs=0.005), what
        assert part == f"{expected[0] / expected[1]:.1%}", what


def test_what_a_run_tells(finished: Path) -> None:
    """The card holds what the run has left; how it says so is in `golden_cards/`."""
    card = card_of(finished)
    summary, found = json.loads((finished / "summary.json").read_text()), tables(card.text)
    told = dict(found["argument", "value"])
    assert (told["`steps`"], told["`tokens`"], told["`epochs`"]) == ("12", str(12 * 4 * 16), "2")
    assert (told["`train_sequences`"], told["`eval_sequences`"]) == ("24", "6")
    assert (told["`learning_rate`"], told["`weight_decay`"], told["`adam_epsilon`"]) == ("0.01", "0.01", "1e-06")
    assert "`bf16`" not in told
    topology = dict(found["topology updates", "3"])
    names = ("`prune_score`", "`regrow_rule`", "`pruning_schedule`")
    assert [topology[name] for name in names] == ["l1", "random", "cosine"]
    assert (topology["`pruning_ratio`"], topology["`num_topology_updates`"]) == ("0.5", "3")
    assert f"{summary['coverage']:.1%}" in card.text
    evaluations = found["step", "training loss", "loss"]
    assert [row[0] for row in evaluations] == ["4", "8", "12"]
    assert evaluations[-1][2] == f"{summary['eval_loss']:.4g}"
    assert {result.metric_type: result.metric_value for result in card.data.eval_results} == {
        "loss": summary["eval_loss"],
        "perplexity": summary["perplexity"],
    }
    assert f"torch {torch.__version__}" in card.text
    assert re.findall(r"!\[.*?\]\((.*?)\)", card.text) == ["training.png", "block_map.png"]


def test_a_checkpoint_of_a_run_that_went_on(finished: Path, tmp_path: Path) -> None:
    text = write_model_card(finished / "checkpoint-8", tmp_path).read_text()
    assert "It was trained for 8 steps" in text
    assert "Topology updates while training: 2." in text


def test_nothing_unknown_is_printed(finished: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    for gone in ("summary.json", "trainer_state.json", "training.png"):
        (run / gone).unlink()
        assert_clean(write_model_card(run).read_text())


def assert_clean(text: str) -> None:
    assert not re.search(r"\bNone\b|Undefined|nan\b|\{\{|\{%|\| +\|", text)
    assert not re.search(r"\n{3,}| $", text, re.MULTILINE)


@pytest.mark.parametrize("kind", CARDS)
def test_the_card_of_each_kind_of_model(kind: str) -> None:
    """See `cards.py`, which writes them again."""
    text = f"{CARDS[kind]()}\n"
    assert text == (GOLDEN / f"{kind}.md").read_text(encoding="utf-8")
    assert_clean(text)


CLASSES = {
    "fill-mask": DynSparseBertForMaskedLM,
    "pre-training": DynSparseBertForPreTraining,
    "text-classification": DynSparseBertForSequenceClassification,
    "token-classification": DynSparseBertForTokenClassification,
    "question-answering": DynSparseBertForQuestionAnswering,
    "multiple-choice": DynSparseBertForMultipleChoice,
    "feature-extraction": DynSparseBertModel,
}
MODELS = {
    **{task: lambda cls=cls: toy_model(cls=cls) for task, cls in CLASSES.items()},
    "dense": lambda: toy_model(sparsity=0),
    "roberta": lambda: sparsify_(tiny_roberta(), block_size=4, sparsity=0.75),
    "roberta made dense": lambda: densify_(sparsify_(tiny_roberta(), block_size=4)),
    "gpt2": lambda: sparsify_(tiny_gpt2(), block_size=(4, 8), sparsity=0.5),
    "distilbert": lambda: sparsify_(tiny_distilbert(), block_size=16, sparsity=0.5),
}


@pytest.mark.parametrize("kind", MODELS)
def test_the_example_works(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = MODELS[kind]()
    text = write_model_card(save(model, tmp_path / "saved")).read_text()
    (example,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert ("import hf_dynsparse" in example) == (kind != "roberta made dense")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(example, names)
    assert type(names["model"]).__name__ == type(model).__name__
    assert not sparse_layers(names["model"])
    shown = capsys.readouterr().out
    assert shown.strip()
    assert ("sparse layers" in shown) == bool(sparse_layers(model))
    task = {"pre-training": "fill-mask", "gpt2": "text-generation", "distilbert": "text-classification"}
    assert ModelCard(text).data.pipeline_tag == task.get(kind, kind if kind in CLASSES else "fill-mask")


def test_kept_models_load_by_the_lines_of_their_cards(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those in model_cards/ that have weights, and one put into such a folder as they are."""
    write_model_card(finished, tmp_path / finished.name, with_weights=True)
    for file in (*ROOT.glob("model_cards/*/*.safetensors"), *tmp_path.glob("*/*.safetensors")):
        (example,) = re.findall(r"```python\n(.*?)```", (file.parent / "README.md").read_text(), re.DOTALL)
        monkeypatch.chdir(file.parents[1])
        names: dict[str, Any] = {}
        exec(example, names)
        assert capsys.readouterr().out.strip()
        facts = json.loads((file.parent / "summary.json").read_text())
        assert facts["checkpoint_bytes"] == checkpoint_bytes(file.parent)
        assert all(value.device.type == "cpu" for value in names["model"].state_dict().values())


@pytest.mark.parametrize("kind", ["fill-mask", "roberta", "gpt2"])
def test_an_empty_model_is_the_saved_one_without_weights(kind: str, tmp_path: Path) -> None:
    model = MODELS[kind]()
    model.half().save_pretrained(tmp_path)
    empty = empty_model(tmp_path)
    assert {name: (x.shape, x.dtype) for name, x in empty.state_dict().items()} == {
        name: (x.shape, x.dtype) for name, x in model.state_dict().items()
    }
    assert {x.device.type for x in empty.parameters()} == {"meta"}


def test_where_names_come_from(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    assert describe_start(str(tmp_path / "model")) == {"start": "model"}
    assert describe_start(None) == {"start": None}
    (tmp_path / "train.txt").touch()
    assert describe_data(str(tmp_path / "train.txt"), evaluated_on="valid.txt") == {
        **{"name": "train.txt", "split": "validation", "evaluated_on": "valid.txt"}
    }


def test_arguments_of_transformers(tmp_path: Path) -> None:
    trainer = DynSparseTrainer(toy_model(), toy_arguments(tmp_path / "out"))
    trainer.create_model_card(
        language="de",
        license="mit",
        tags="mine",
        model_name="a name",
        finetuned_from="user/start",
        tasks=["feature-extraction"],
        dataset_tags=["user/data", "user/other"],
        dataset="The data",
        dataset_args="part",
    )
    card = card_of(tmp_path / "out")
    assert (card.data.language, card.data.license, card.data.base_model) == ("de", "mit", "user/start")
    assert (card.data.pipeline_tag, card.data.datasets) == ("feature-extraction", ["user/data", "user/other"])
    assert "mine" in card.data.tags
    assert "# a name" in card.text
    assert (
        "from [user/start](https://huggingface.co/user/start) on [The data](https://huggingface.co/datasets/user/data)"
        in card.text
    )


# PEFT asks for it under an old name.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_an_adapter_gets_the_card_of_transformers(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(toy_model(sparsity=0), peft.LoraConfig(target_modules=["query"]))
    DynSparseTrainer(model, toy_arguments(tmp_path), data_collator=toy_collator()).create_model_card()
    assert "generated automatically" in (tmp_path / "README.md").read_text()


def test_facts_of_the_scripts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What each script tells beside what the trainer knows; their own tests run them."""
    monkeypatch.chdir(tmp_path)
    for name in ("train.txt", "valid.txt"):
        Path(name).touch()
    mlm, glue, qa = (
        runpy.run_path(str(ROOT / "examples" / f"run_{name}_dynsparse.py")) for name in ("mlm", "glue", "qa")
    )

    def about(script: dict[str, Any], model: dict[str, Any], data: dict[str, Any], *rest: str) -> dict[str, Any]:
        kinds = inspect.signature(script["about_run"]).parameters.values()
        of_model, of_data = [kind.annotation for kind in kinds][:2]
        return script["about_run"](of_model(**model), of_data(**data), *rest)

    facts = about(mlm, {"license": "mit"}, {"train_file": "train.txt", "language": "en"}, "train")
    assert (facts["start"], facts["license"], facts["language"]) == (None, "mit", "en")
    assert facts["data"] == {"name": "train.txt", "split": "train", "evaluated_on": "held out of train.txt"}
    both = {"train_file": "train.txt", "validation_file": "valid.txt"}
    assert about(mlm, {}, both, "validation")["data"]["evaluated_on"] == "valid.txt"
    assert about(mlm, {}, {}, "validation")["data"]["name"] == "embedded corpus of hf_dynsparse"
    facts = about(glue, {"model_name_or_path": "me/start", "sparsity": 0.5}, {"task_name": "mnli"})
    assert (facts["base_model"], facts["pattern"]) == ("me/start", "the blocks of largest L1 norm")
    assert facts["language"] == "en"
    assert facts["data"]["split"] == "validation_matched"
    facts = about(glue, {"model_name_or_path": "me/start"}, both)
    assert facts["data"] == {"name": "train.txt", "split": "validation", "evaluated_on": "valid.txt"}
    assert facts["language"] is None
    facts = about(qa, {"model_name_or_path": "me/start"}, {"dataset_name": "rajpurkar/squad"})
    assert (facts["data"]["id"], facts["pattern"]) == ("rajpurkar/squad", "that of the checkpoint")


VALIDATE = """
import json, os, sys
sys.path.insert(0, sys.argv[1])
from hub_server import Hub
os.environ["HF_ENDPOINT"] = Hub(sys.argv[2]).start().url
from huggingface_hub import ModelCard
def verdict(path):
    try:
        ModelCard.load(path).validate()
    except ValueError as error:
        return str(error)
print(json.dumps([verdict(path) for path in sys.argv[3:]]))
"""


def test_the_hub_accepts_the_metadata(tmp_path: Path) -> None:
    """By the loopback Hub; a card with a licence that there is none of shows that it looks."""
    cards = list(map(str, sorted(GOLDEN.iterdir())))
    wrong = tmp_path / "wrong.md"
    wrong.write_text((GOLDEN / "pretrained.md").read_text().replace("license: mit", "license: free as in beer"))
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            VALIDATE,
            str(HUB_SERVER.parent),
            str(tmp_path / "store"),
            *map(str, cards),
            str(wrong),
        ],
        env={**os.environ, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": "hf_test_write"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    *accepted, refused = json.loads(done.stdout.splitlines()[-1])
    assert accepted == [None] * len(CARDS)
    assert "free as in beer" in refused
