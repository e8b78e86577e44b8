"""The README.md beside a saved model: written once, replaced by a card, never over somebody else's."""

import copy
import pickle

import pytest
from huggingface_hub import ModelCard
from transformers import BertConfig, BertForMaskedLM, RobertaConfig, RobertaForMaskedLM

from hf_dynsparse import DynSparseTrainer, densify_, sparsify_, write_model_card
from tests.toy import toy_arguments, toy_batch, toy_collator, toy_model


SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "vocab_size": 64,
}


def stock_model():
    return sparsify_(RobertaForMaskedLM(RobertaConfig(**SIZES, pad_token_id=0)), block_size=4, sparsity=0.5)


def int8_model(build):
    from hf_dynsparse.compress.int8 import prepare_qat_, to_int8_

    model = prepare_qat_(build()).train()
    batch = toy_batch()
    model(batch["input_ids"], labels=batch["labels"]).loss.backward()
    return to_int8_(model)


MODELS = {
    "a BERT": (toy_model, "from hf_dynsparse import DynSparseBertForMaskedLM", "block-sparse"),
    "another architecture": (stock_model, "from transformers import RobertaForMaskedLM", "block-sparse"),
    "an int8 BERT": (lambda: int8_model(toy_model), "from hf_dynsparse import DynSparseBertForMaskedLM", "int8"),
    "int8 of another architecture": (lambda: int8_model(stock_model), "import RobertaForMaskedLM", "int8"),
}


@pytest.mark.parametrize("which", MODELS)
def test_beside_a_saved_model(which, tmp_path):
    build, line, tag = MODELS[which]
    model = build()
    model.save_pretrained(tmp_path / "saved")
    readme = tmp_path / "saved" / "README.md"
    card = ModelCard.load(readme)
    assert card.data.library_name == "transformers"
    assert card.data.tags == ["dynsparse", "block-sparse", "int8"][: 3 if tag == "int8" else 2]
    for part in ("# saved\n", "pip install hf_dynsparse", "import hf_dynsparse ", line, '.from_pretrained("saved")'):
        assert part in card.text, part
    readme.write_text("mine")
    model.save_pretrained(tmp_path / "saved")
    assert readme.read_text() == "mine"
    model.save_pretrained(tmp_path / "checkpoint-5")
    model.save_pretrained(tmp_path / "rank1", is_main_process=False)
    assert not list(tmp_path.glob("[cr]*/README.md"))


def test_dense_models_need_none(tmp_path):
    for number, model in enumerate((BertForMaskedLM(BertConfig(**SIZES)), densify_(stock_model()))):
        model.save_pretrained(tmp_path / str(number))
        assert not (tmp_path / str(number) / "README.md").exists()


def test_copies_write_their_own(tmp_path):
    model = stock_model()
    for number, other in enumerate((copy.deepcopy(model), pickle.loads(pickle.dumps(model)))):
        other.classifier_of_the_copy = None
        assert other.save_pretrained.args[0] is other
        other.save_pretrained(tmp_path / str(number))
        assert (tmp_path / str(number) / "README.md").exists()


def test_the_card_of_a_run_replaces_it_and_no_other(tmp_path, caplog):
    trainer = DynSparseTrainer(toy_model(), toy_arguments(tmp_path), data_collator=toy_collator())
    trainer.save_model()
    readme = tmp_path / "README.md"
    short = readme.read_text()
    assert "pip install hf_dynsparse" in short
    trainer.create_model_card()
    card = readme.read_text()
    assert "## Licence" in card
    trainer.create_model_card()  # of a resumed run
    assert readme.read_text() == card
    trainer.save_model()
    assert readme.read_text() == card
    readme.write_text("mine")
    trainer.create_model_card()
    assert readme.read_text() == "mine"
    assert "is not of this package and stays" in caplog.text
    write_model_card(tmp_path)  # asked for by name
    assert "## Licence" in readme.read_text()
