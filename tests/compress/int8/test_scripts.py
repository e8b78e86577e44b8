"""Quantisation-aware training by the training scripts, as users run them."""

import json
import random
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForQuestionAnswering, AutoModelForSequenceClassification

from hf_dynsparse import DynSparseBertForQuestionAnswering, DynSparseBertForSequenceClassification
from hf_dynsparse.compress.int8 import Int8BlockSparseLinear, Int8Embedding
from hf_dynsparse.training.finetuning import FinetuningArguments
from tests.scripts import EXAMPLES, assert_same_weights, run_script
from tests.toy import WORDS, toy_model, toy_tokenizer


TOY = (
    "--max_steps 4 --per_device_train_batch_size 4 --num_threads 1 --save_strategy steps --save_steps 2 --use_cpu true"
    " --eval_strategy no --disable_tqdm true --kernel_tuning off --logging_steps 1 --report_to none"
    " --save_total_limit 5 --quantization_aware"
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Fine-tuned models `glue` and `qa`, and data for both."""
    folder, draw = tmp_path_factory.mktemp("int8"), random.Random(0)
    classes = {"glue": DynSparseBertForSequenceClassification, "qa": DynSparseBertForQuestionAnswering}
    for name, cls in classes.items():
        toy_model(cls=cls).save_pretrained(folder / name)
        toy_tokenizer().save_pretrained(folder / name)

    def words():
        return " ".join(draw.choice(WORDS[:44]) for _ in range(6))

    (folder / "glue.csv").write_text("text,label\n" + "".join(f"{words()},{'ab'[i % 2]}\n" for i in range(16)))
    contexts = [words() for _ in range(8)]
    rows = [
        {
            "id": str(number),
            "context": context,
            "question": words(),
            "answers": {"text": [context.split()[0]], "answer_start": [0]},
        }
        for number, context in enumerate(contexts)
    ]
    (folder / "qa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def run(data, script, output, flags=""):
    file = data / {"glue": "glue.csv", "qa": "qa.jsonl"}[script]
    common = f"--model_name_or_path {data / script} --train_file {file} --validation_file {file}"
    more = {"glue": "--max_seq_length 24", "qa": "--max_seq_length 24 --doc_stride 4"}[script]
    command = f"{TOY} {common} {more} --cache_dir {data / 'cache'} --output_dir {output} {flags}"
    run_script(EXAMPLES / f"run_{script}_dynsparse.py", command)
    return json.loads((output / "summary.json").read_text())


def test_glue(data, tmp_path):
    output = tmp_path / "out"
    summary = run(data, "glue", output, f"--teacher {data / 'glue'}")
    model = AutoModelForSequenceClassification.from_pretrained(output)
    assert sum(isinstance(module, Int8BlockSparseLinear) for module in model.modules()) == 12
    assert isinstance(model.get_input_embeddings(), Int8Embedding)
    assert summary["learning_rate"] == 1e-5
    assert summary["mode"] == "locked"
    rounded, final = summary["rounded_metrics"], summary["metrics"]
    assert rounded.keys() == final.keys() >= {"accuracy", "loss"}
    assert final["accuracy"] == rounded["accuracy"]
    assert final["loss"] == pytest.approx(rounded["loss"], abs=1e-4)
    tensors = load_file(output / "model.safetensors")
    encoder = sum(t.numel() * t.element_size() for name, t in tensors.items() if ".encoder." in name)
    assert (summary["encoder_bytes"], summary["dense_encoder_bytes"]) == (encoder, 4 * 2 * 8544)
    assert summary["checkpoint_bytes"] == sum(t.numel() * t.element_size() for t in tensors.values())
    assert "quantize_embeddings" not in (output / "config.json").read_text()
    assert "int8" in (output / "README.md").read_text()
    # A run that was cut off goes on as if nothing had been.
    part = tmp_path / "part"
    shutil.copytree(output / "checkpoint-2", part / "checkpoint-2")
    run(data, "glue", part, f"--teacher {data / 'glue'} --resume_from_checkpoint last")
    assert_same_weights(output, part)
    # Earlier versions did not round embeddings by default, and wrote nothing of it: their runs go on as they began.
    old = tmp_path / "old"
    shutil.copytree(output / "checkpoint-2", old / "checkpoint-2")
    config = old / "checkpoint-2/config.json"
    config.write_text(config.read_text().replace('"quantize_embeddings": true,', ""))
    run(data, "glue", old, f"--teacher {data / 'glue'} --resume_from_checkpoint last")
    assert type(AutoModelForSequenceClassification.from_pretrained(old).get_input_embeddings()) is torch.nn.Embedding
    for folder, rounded in ((old, False), (part, True)):
        assert json.loads((folder / "checkpoint-4/config.json").read_text())["quantize_embeddings"] is rounded
    checkpoint = AutoModelForSequenceClassification.from_pretrained(output / "checkpoint-4")
    assert type(checkpoint.classifier) is torch.nn.Linear


def test_questions(data, tmp_path):
    summary = run(data, "qa", tmp_path / "out", "--quantize_embeddings false")
    assert summary["metrics"]["f1"] == summary["rounded_metrics"]["f1"]
    model = AutoModelForQuestionAnswering.from_pretrained(tmp_path / "out")
    assert model.qa_outputs.int8_values.dtype == torch.int8
    assert type(model.get_input_embeddings()) is torch.nn.Embedding


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ({"quantization_aware": True, "finetune_mode": "dynamic"}, "keeps the pattern. Got `finetune_mode` dynamic"),
        ({"quantize_embeddings": True}, "needs `quantization_aware`. Got it alone"),
    ],
)
def test_arguments_that_do_not_fit(tmp_path, given, error):
    with pytest.raises(ValueError, match=error):
        FinetuningArguments(output_dir=str(tmp_path), use_cpu=True, **given)
