"""run_earlybert.py as users run it, on tiny data made here."""

import json
import random
import shutil
import sys

import pytest
import torch
from scripts import EXAMPLES, assert_same_weights, run_script
from toy import WORDS, toy_model, toy_tokenizer
from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification, BertConfig, BertModel

from hf_dynsparse import Ticket, sparse_layers, topology_summary
from hf_dynsparse.models.bert.configuration_dynsparse_bert import layer_sizes


TOY = (
    "--max_steps 8 --per_device_train_batch_size 4 --num_threads 1 --max_seq_length 24 --eval_strategy no"
    " --save_strategy steps --save_steps 3 --disable_tqdm true --kernel_tuning off --logging_steps 1 --use_cpu true"
    " --report_to none --learning_rate 1e-3"
)
# Eight steps are two epochs of the 16 sentences; the search ends after the fifth at the latest.
SEARCH = "--draw_every 1 --search_fallback 5 --ticket_tolerance 1e-6 --head_ratio 0.5"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """`start`, a stock BERT of four heads; sentences with labels; text."""
    folder = tmp_path_factory.mktemp("early")
    draw = random.Random(0)
    config = toy_model(sparsity=0.0).config.to_dict() | {"num_attention_heads": 4, "model_type": "bert"}
    stock = {name: value for name, value in config.items() if name in BertConfig().to_dict()}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        BertModel(BertConfig(**stock)).save_pretrained(folder / "start")
    toy_tokenizer().save_pretrained(folder / "start")

    def sentence():
        return " ".join(draw.choice(WORDS[:44]) for _ in range(draw.randint(3, 12)))

    (folder / "own.csv").write_text("text,label\n" + "".join(f"{sentence()},{i % 2}\n" for i in range(16)))
    (folder / "nolabel.csv").write_text("text,label\nw1 w2,1\nw3,\n")
    (folder / "latin1.csv").write_bytes(b"text,label\ncaf\xe9,b\n")
    (folder / "text.txt").write_text("".join(f"{sentence()}\n" for _ in range(400)))
    return folder


@pytest.fixture(scope="module")
def run(data):
    def run_task(output, flags=""):
        files = f"--train_file {data / 'own.csv'} --validation_file {data / 'own.csv'}"
        common = f"--model_name_or_path {data / 'start'} --cache_dir {data / 'cache'} --output_dir {output} {files}"
        # The examples import each other, as siblings do.
        with pytest.MonkeyPatch.context() as patch:
            patch.syspath_prepend(str(EXAMPLES))
            run_script(EXAMPLES / "run_earlybert.py", f"{TOY} {SEARCH} {common} {flags}")
        return output

    yield run_task
    for name in ("run_glue_dynsparse", "run_mlm_dynsparse"):
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def finished(run, tmp_path_factory):
    """All stages in one go. Not to be changed."""
    return run(tmp_path_factory.mktemp("finished") / "out")


def summary_of(folder):
    return json.loads((folder / "summary.json").read_text())


def test_all_stages(finished):
    ticket = Ticket.load(finished / "ticket.json")
    assert [len(layer) for layer in ticket.heads] == [2, 2]
    assert sum(map(len, ticket.neurons)) == 128 - 51
    model = AutoModelForSequenceClassification.from_pretrained(finished)
    assert layer_sizes(model.config) == [(2, len(layer)) for layer in ticket.neurons]
    assert not any("gates" in name for name in model.state_dict())
    early, summary = summary_of(finished)["earlybert"], summary_of(finished)
    assert (early["ticket"], early["step"], early["reason"], early["heads"]) == ("search", 5, "fallback", [2, 2])
    assert early["num_neurons"] == [64, 64]
    assert early["search_seconds"] > 0
    assert early["train_seconds"] == summary["seconds"] > 0
    assert early["total_seconds"] == early["search_seconds"] + early["train_seconds"]
    # The training has a rate of its own; the search followed the schedule of a whole run.
    assert (summary["learning_rate"], summary["steps"]) == (2e-3, 8)
    log = json.loads((finished / "search" / "checkpoint-3" / "trainer_state.json").read_text())["log_history"]
    assert [entry["learning_rate"] for entry in log][1:] == pytest.approx([1e-3 * (1 - i / 7) for i in range(2)])
    card = (finished / "README.md").read_text()
    assert "EarlyBERT ticket" in card
    assert "4 of 8 attention heads and 77 of 128 intermediate neurons were kept" in card
    assert "The search stopped at step 5, its last" in card
    assert (finished / "ticket.png").stat().st_size > 1000
    assert "](ticket.png)" in card


def test_training_starts_from_the_early_weights(run, finished, data, tmp_path):
    """A rate of 0: what comes out is what went in, without the units that the ticket leaves out."""
    output = run(tmp_path / "out", f"--ticket {finished / 'ticket.json'} --train_learning_rate 0 --save_strategy no")
    ticket = Ticket.load(output / "ticket.json")
    assert ticket == Ticket.load(finished / "ticket.json")
    early = BertModel.from_pretrained(data / "start").encoder.layer[1]
    late = AutoModelForSequenceClassification.from_pretrained(output).bert.encoder.layer[1]
    kept = list(ticket.neurons[1])
    assert torch.equal(late.intermediate.dense.weight, early.intermediate.dense.weight[kept])
    assert torch.equal(late.output.dense.weight, early.output.dense.weight[:, kept])
    rows = [8 * head + row for head in ticket.heads[1] for row in range(8)]
    assert torch.equal(late.attention.self.query.weight, early.attention.self.query.weight[rows])


def test_resumed_training(run, finished, tmp_path):
    """Interrupted after six steps: the search is not repeated."""
    output = tmp_path / "out"
    shutil.copytree(finished, output, ignore=shutil.ignore_patterns("summary.json", "checkpoint-8", "search"))
    (output / "model.safetensors").unlink()
    with pytest.raises(SystemExit, match="must not hold another run"):
        run(output)
    run(output, "--resume_from_checkpoint last")
    assert_same_weights(finished, output)
    assert not (output / "search").exists()


def test_resumed_search_and_stages_one_by_one(run, finished, tmp_path):
    """Interrupted after three steps of the search."""
    output = tmp_path / "out"
    with pytest.raises(SystemExit, match="`--stage train` needs a ticket"):
        run(output, "--stage train")
    shutil.copytree(finished / "search", output / "search", ignore=shutil.ignore_patterns("ticket.json"))
    run(output, "--stage search --resume_from_checkpoint last")
    assert Ticket.load(output / "ticket.json") == Ticket.load(finished / "ticket.json")
    assert not (output / "config.json").exists()
    run(output, "--stage train --save_strategy no")
    assert_same_weights(finished, output)


def test_a_random_ticket_sparse_afterwards(run, tmp_path):
    flags = "--ticket random:1 --multiple_of 8 --sparsity 0.5 --block_size 4 --save_strategy no"
    output = run(tmp_path / "out", flags)
    early = summary_of(output)["earlybert"]
    assert (early["ticket"], early["search_seconds"]) == ("random:1", 0.0)
    assert (early["heads"], early["neurons"]) == ([2, 2], [40, 40])
    assert "chosen by `random:1`, without a search" in (output / "README.md").read_text()
    assert (output / "ticket.png").stat().st_size > 1000
    model = AutoModelForSequenceClassification.from_pretrained(output)
    assert len(sparse_layers(model)) == 12
    assert topology_summary(model).sparsity == pytest.approx(0.5, abs=0.01)
    assert layer_sizes(model.config) == [(2, 40), (2, 40)]


def test_the_dense_model_by_the_full_recipe(run, finished, tmp_path, capsys):
    output = run(tmp_path / "dense", "--ticket none --save_strategy no")
    summary = summary_of(output)
    assert (summary["earlybert"]["ticket"], summary["learning_rate"]) == ("none", 1e-3)
    assert summary["earlybert"]["total_seconds"] == summary["seconds"]
    assert not (output / "ticket.json").exists()
    assert "EarlyBERT" not in (output / "README.md").read_text()
    capsys.readouterr()
    run_script(EXAMPLES / "compare_earlybert.py", f"{output} {finished}")
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[2:4]]
    assert [row[1:3] for row in rows] == [["all", "all"], ["4 of 8", "77 of 128"]]
    ratio = summary_of(finished)["earlybert"]["total_seconds"] / summary["seconds"]
    assert [row[-1] for row in rows] == ["1.00 |", f"{ratio:.2f} |"]


def test_masked_language_modelling(data, tmp_path):
    flags = (
        f"{TOY} {SEARCH} --mlm --train_file {data / 'text.txt'} --cache_dir {data / 'cache'} --vocab_size 100"
        " --preset tiny --config_overrides hidden_size=32,intermediate_size=64,num_attention_heads=4"
        f" --output_dir {tmp_path / 'out'} --save_strategy no --max_eval_samples 8"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        run_script(EXAMPLES / "run_earlybert.py", flags)
    summary = summary_of(tmp_path / "out")
    assert (summary["earlybert"]["step"], summary["earlybert"]["heads"]) == (5, [2, 2])
    assert (summary["steps"], summary["learning_rate"], summary["sparsity"]) == (8, 1e-3, 0.0)
    model = AutoModelForMaskedLM.from_pretrained(tmp_path / "out")
    assert [neurons for _, neurons in layer_sizes(model.config)] == summary["earlybert"]["neurons"]


def test_text_that_is_refused_leaves_nothing(tmp_path):
    (tmp_path / "short.txt").write_text("too short to fill a sequence, but a tokenizer can be trained on it\n")
    flags = f"--mlm --train_file {tmp_path / 'short.txt'} --vocab_size 100 --max_seq_length 512"
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        with pytest.raises(SystemExit, match="must fill at least one sequence"):
            run_script(EXAMPLES / "run_earlybert.py", f"{TOY} {flags} --output_dir {tmp_path / 'out'}")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--ticket random", "`--ticket random:SEED` needs a number. Got 'random'"),
        ("--stage search --ticket none", "`--stage search` searches"),
        ("--resume_from_checkpoint elsewhere", "must be `last` here"),
        ("--neuron_ratio 1.2", r"`neuron_ratio` must lie in \[0, 1\)"),
        ("--do_train false", "This script searches, slims and trains"),
        ("--quantization_aware true", "Go on from its model with run_glue_dynsparse.py"),
        ("--sparsity 0.5 --block_size 3x", "block"),
        ("--sparsity 0.5 --block_size 4x8 --multiple_of 4", r"sides of a block, 4 x 8: .* Got 4. Give 8"),
        ("--sparsity 0.5 --block_size *=4", "A slimmed model gets one block size"),
        ("--ticket no.json", "no.json"),
        ("--stage train", "`--stage train` needs a ticket"),
        ("--mlm false --do_train false", "This script searches, slims and trains"),
        ("--train_file {data}/nolabel.csv", "nolabel.csv must have a `label`, .* Got no label in row 2"),
        ("--train_file {data}/latin1.csv", "latin1.csv: byte 0xe9 in line 2, which is not UTF-8"),
        ("--max_seq_length 1000", "`--max_seq_length` must not exceed the positions of the model. Got 1000"),
    ],
)
def test_refused(run, data, tmp_path, flags, message):
    with pytest.raises(SystemExit, match=message):
        run(tmp_path / "out", flags.format(data=data))
    assert not (tmp_path / "out").exists()  # before any work


def test_another_ticket_in_the_same_folder_is_refused(run, finished, tmp_path):
    (tmp_path / "out").mkdir()
    shutil.copyfile(finished / "ticket.json", tmp_path / "out" / "ticket.json")
    with pytest.raises(SystemExit, match="`--ticket` must be that of .* already. Got random:3"):
        run(tmp_path / "out", "--stage train --ticket random:3")
    other = json.loads((finished / "ticket.json").read_text())
    other["num_neurons"] = [65, 65]
    (tmp_path / "out" / "ticket.json").write_text(json.dumps(other))
    with pytest.raises(SystemExit, match="A ticket must be for the model"):
        run(tmp_path / "out", "--stage train")
