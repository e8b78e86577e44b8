"""Masks filled by several models: what they would say themselves, and errors before any weight is read."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from hf_dynsparse import DynSparseBertForSequenceClassification
from hf_dynsparse.checkpoints.loading import load_model
from hf_dynsparse.reports import masks
from hf_dynsparse.reports.masks import fill_masks, mask_rows
from tests.toy import MASK, toy_model, toy_tokenizer


def save(model: Any, folder: Path, tokenizer: Any = None) -> Path:
    model.save_pretrained(folder)
    (toy_tokenizer() if tokenizer is None else tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    with torch.no_grad():
        model = toy_model()
        model.get_output_embeddings().bias.normal_()  # or all pieces are about as likely
    angular = toy_tokenizer()
    angular.add_special_tokens({"mask_token": "<mask>"})
    larger = toy_model(vocab_size=len(angular))
    return {
        "sparse": save(model, folder / "sparse"),
        "dense": save(model.to_dense(), folder / "dense"),
        "other": save(larger, folder / "other", angular),
    }


def test_every_mask_is_filled_by_every_model(saved: dict[str, Path]) -> None:
    texts = ["w1 [MASK] w3 [MASK]", "[MASK] w2"]
    filled = fill_masks(saved, texts, top=4)
    assert [(mask.text, mask.number) for mask in filled] == [(texts[0], 1), (texts[0], 2), (texts[1], 1)]
    inputs = toy_tokenizer()(texts[0], return_tensors="pt")
    (places,) = (inputs["input_ids"][0] == MASK).nonzero(as_tuple=True)
    logits = load_model(saved["sparse"])(**inputs).logits[0, places[1]].detach()
    shares = logits.exp() / logits.exp().sum()
    for name in ("sparse", "dense"):
        guesses = filled[1].guesses[name]
        assert [guess.piece for guess in guesses] == toy_tokenizer().convert_ids_to_tokens(shares.topk(4).indices)
        assert [guess.probability for guess in guesses] == pytest.approx(shares.topk(4).values.tolist(), rel=1e-4)
    first, *rows = mask_rows(filled)
    assert first == ["text", "sparse", "dense", "other"]
    assert [row[0] for row in rows] == [f"{texts[0]} (mask 1)", f"{texts[0]} (mask 2)", texts[1]]
    assert rows[1][1] == ", ".join(f"{piece} {share:.2f}" for piece, share in filled[1].guesses["sparse"])


def test_the_mask_of_a_tokenizer_does_too(saved: dict[str, Path]) -> None:
    assert AutoTokenizer.from_pretrained(saved["other"]).mask_token == "<mask>"
    ours, theirs = fill_masks({"other": saved["other"]}, ["w1 [MASK]", "w1 <mask>"])
    assert ours.guesses == theirs.guesses


@pytest.mark.parametrize(
    ("text", "top", "error"),
    [
        ("w1 w2", 3, r"must hold \[MASK\] where a word is missing. Got 'w1 w2'"),
        ("w1 " * 40 + "[MASK]", 3, "at most 32 tokens for .*sparse. Got 43"),
        ("[MASK]", 65, r"`top` must lie in \[1, 64\], .* Got 65"),
    ],
)
def test_a_text_that_cannot_be_filled(
    saved: dict[str, Path], text: str, top: int, error: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(masks, "load_model", lambda source: pytest.fail("read weights"))
    with pytest.raises(ValueError, match=error):
        fill_masks({"sparse": saved["sparse"]}, ["w1 [MASK]", text], top)


def test_a_model_that_cannot_fill(saved: dict[str, Path], tmp_path: Path) -> None:
    classifier = save(toy_model(cls=DynSparseBertForSequenceClassification), tmp_path / "classifier")
    with pytest.raises(ValueError, match=f"Got {classifier}, a DynSparseBertForSequenceClassification"):
        fill_masks({"sparse": saved["sparse"], "classifier": classifier}, ["[MASK]"])
    toy_model().save_pretrained(tmp_path / "alone")
    with pytest.raises(ValueError, match=f"must have its tokenizer beside it. Got {tmp_path / 'alone'}"):
        fill_masks({"alone": tmp_path / "alone"}, ["[MASK]"])
