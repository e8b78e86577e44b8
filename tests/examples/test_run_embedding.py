"""run_embedding_dynsparse.py as users run it, on tiny data made here."""

import gzip
import json
import random
import re
import shutil

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModel, BertConfig, BertModel

from hf_dynsparse import sparse_layers
from hf_dynsparse.data import glue_metrics, read_glue
from tests.scripts import EXAMPLES, assert_same_weights, run_script
from tests.toy import TOY_SIZES, WORDS, toy_model, toy_tokenizer


TOY = (
    "--max_steps 4 --per_device_train_batch_size 8 --num_threads 1 --max_seq_length 24 --save_strategy steps"
    " --save_steps 2 --save_total_limit 5 --eval_strategy no --disable_tqdm true --kernel_tuning off --logging_steps 1"
    " --use_cpu true --report_to none --sparsity 0.5 --block_size 4 --calibration_samples 40 --learning_rate 1e-3"
)


def sentence(draw):
    return " ".join(draw.choice(WORDS[:44]) for _ in range(draw.randint(3, 12)))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """`dense`, a sentence encoder; `plain`, an encoder without sentence files; sentences, and pairs of them."""
    folder, draw = tmp_path_factory.mktemp("embedding"), random.Random(0)
    sizes = {name: value for name, value in TOY_SIZES.items() if name not in ("block_size", "sparsity")}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = BertModel(BertConfig(num_hidden_layers=2, initializer_range=0.2, **sizes))
    for name in ("dense", "plain"):
        model.save_pretrained(folder / name)
        toy_tokenizer().save_pretrained(folder / name)
    kinds = {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}
    modules = [{"path": path, "type": f"sentence_transformers.models.{kind}"} for path, kind in kinds.items()]
    (folder / "dense" / "modules.json").write_text(json.dumps(modules))
    (folder / "dense" / "1_Pooling").mkdir()  # as on the Hub, where there are no empty folders
    settings = {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False, "include_prompt": True}
    (folder / "dense" / "1_Pooling" / "config.json").write_text(json.dumps(settings))
    (folder / "dense" / "sentence_bert_config.json").write_text('{"max_seq_length": 19}')
    with gzip.open(folder / "text.txt.gz", "wt") as file:
        file.write("\n\n".join(sentence(draw) for _ in range(60)))
    (folder / "glue" / "STS-B").mkdir(parents=True)
    lines = [f"{sentence(draw)}\t{sentence(draw)}\t{number % 5}" for number in range(12)]
    (folder / "glue" / "STS-B" / "dev.tsv").write_text("\n".join(["sentence1\tsentence2\tscore", *lines]) + "\n")
    toy_model().save_pretrained(folder / "sparse")
    toy_tokenizer().save_pretrained(folder / "sparse")
    return folder


@pytest.fixture
def run(data, tmp_path):
    """Run the script in this process; gives back its output folder."""

    def run_toy(flags="", output="out", start="dense"):
        common = f"--train_file {data / 'text.txt.gz'} --cache_dir {data / 'cache'} --output_dir {tmp_path / output}"
        flags = f"{TOY} --model_name_or_path {data / start} {common} {flags}"
        run_script(EXAMPLES / "run_embedding_dynsparse.py", flags)
        return tmp_path / output

    return run_toy


def test_an_encoder_is_recovered(run, data, tmp_path):
    flags = f"--glue_dir {data / 'glue'} --distillation_layers all --distillation_relations last"
    output = run(flags)
    summary, results = (json.loads((output / f"{name}.json").read_text()) for name in ("summary", "all_results"))
    assert summary["metrics"]["teacher_cosine"] > summary["metrics_at_start"]["teacher_cosine"]
    assert (summary["sparsity"], summary["teacher"], summary["mode"]) == (0.5, "dense", "locked")
    assert summary["arguments"]["distillation_layers"] == "all"
    assert summary["arguments"]["distillation_relations"] == "last"
    # Spearman's correlation again, by the files that it wrote.
    model, rows = AutoModel.from_pretrained(output).eval(), read_glue(data / "glue", "stsb")["validation"]
    assert sparse_layers(model)
    with torch.no_grad():
        inputs = [
            toy_tokenizer()(list(rows[name]), padding=True, return_tensors="pt") for name in rows.column_names[:2]
        ]
        first, second = (model(**batch).last_hidden_state[:, 0] for batch in inputs)
    cosines = F.cosine_similarity(first, second).tolist()
    wanted = glue_metrics("stsb", cosines, rows["label"])["spearmanr"]
    assert results["eval_spearman_cosine"] == pytest.approx(wanted, abs=1e-6)
    for name in ("modules.json", "1_Pooling/config.json", "sentence_bert_config.json"):
        assert (output / name).read_bytes() == (data / "dense" / name).read_bytes()
    assert not (output / "2_Normalize").exists()
    card = (output / "README.md").read_text()
    assert "pipeline_tag: sentence-similarity" in card
    assert "matter most to 40 training examples" in card
    shutil.copytree(output / "checkpoint-2", tmp_path / "part" / "checkpoint-2")
    assert_same_weights(output, run(f"{flags} --resume_from_checkpoint last", "part"))


def test_an_encoder_without_sentence_files(run):
    output = run(
        "--pooling max --finetune_mode dynamic --num_topology_updates 2 --calibration_samples 0", start="plain"
    )
    assert json.loads((output / "summary.json").read_text())["topology_updates"] == 2
    modules = json.loads((output / "modules.json").read_text())
    assert [(module["idx"], module["path"], module["type"].split(".")[-1]) for module in modules] == [
        (0, "", "Transformer"),
        (1, "1_Pooling", "Pooling"),
    ]
    pooling = json.loads((output / "1_Pooling" / "config.json").read_text())
    assert pooling.pop("word_embedding_dimension") == 32
    assert [name for name, chosen in pooling.items() if chosen] == ["pooling_mode_max_tokens"]
    settings = json.loads((output / "sentence_bert_config.json").read_text())
    assert settings == {"max_seq_length": 24, "do_lower_case": False}


@pytest.mark.parametrize(
    ("flags", "start", "error"),
    [
        ("--dataset_name some/thing", "dense", "Give the sentences: --train_file or --dataset_name. Got both"),
        ("--do_predict", "dense", "Got --do_predict. Leave it out"),
        (
            "--pooling mean",
            "dense",
            "one of mean, cls, max. Got mean, and cls in that",
        ),
        ("", "sparse", "learns from a `--teacher`"),
        ("--max_seq_length 40", "dense", "The model has 32: give --max_seq_length"),
        ("--calibration_samples 2", "dense", "must hold at least 64 tokens"),
        ("--glue_dir {data}/none", "dense", "`stsb` must have files such as train.tsv and dev.tsv"),
    ],
)
def test_errors_come_before_any_work(run, data, tmp_path, flags, start, error):
    with pytest.raises(SystemExit, match=re.escape(error)):
        run(flags.format(data=data), start=start)
    assert not (tmp_path / "out").exists()


def test_sentences_to_recover_by(tmp_path):
    rows = {
        "MNLI": ["index\tsentence1\tsentence2\tlabel", "0\tOne premise here.\tIt follows so.\tneutral"],
        "QNLI": ["index\tquestion\tsentence\tlabel", "0\tWho was it?\tTwo words\tentailment"],  # one is too short
        "CoLA": ["gj04\t1\t\tNo header stands here."],
        "SST-2": ["sentence\tlabel", "a fragment of three\t1", "a fragment that is long enough to be kept\t0"],
    }
    for task, lines in rows.items():
        (tmp_path / task).mkdir()
        (tmp_path / task / "train.tsv").write_text("\n".join(lines) + "\n")
    (tmp_path / "text.txt").write_text("= Title =\nToo short. The first sentence of it. A second one is here.\n")
    output = tmp_path / "sentences.txt.gz"
    flags = f"--glue_dir {tmp_path} --text {tmp_path / 'text.txt'} --text_sentences 1 --output {output}"
    run_script(EXAMPLES / "study" / "sentences.py", flags)
    assert sorted(gzip.decompress(output.read_bytes()).decode().splitlines()) == [
        "It follows so.",
        "No header stands here.",
        "One premise here.",
        "The first sentence of it.",
        "Who was it?",
        "a fragment that is long enough to be kept",
    ]
