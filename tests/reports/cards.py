"""
A card for each kind of model, of a run that is written out here. What they must be stands in `golden_cards/`; after a
change of the card that is meant:

    python -m tests.reports.cards
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from transformers import RobertaConfig, RobertaForMaskedLM

from hf_dynsparse import (
    DynSparseBertForQuestionAnswering,
    DynSparseBertForSequenceClassification,
    prepare_qat_,
    sparsify_,
    to_int8_,
)
from hf_dynsparse.reports.facts import describe_data, describe_start
from hf_dynsparse.reports.model_card import create_model_card
from tests.toy import toy_batch, toy_model


GOLDEN = Path(__file__).with_name("golden_cards")
CARDS: dict[str, Callable[[], ModelCard]] = {}

RUN: dict[str, Any] = {
    "model_name": "toy",
    "start": None,
    "data": {"name": "words.txt", "split": "validation", "evaluated_on": "held out of words.txt"},
    "license": "mit",
    "language": "en",
    "seed": 42,
    "steps": 1200,
    "epochs": 2.5,
    "seq_len": 16,
    "tokens": 76800,
    "train_sequences": 2400,
    "eval_sequences": 6,
    "seconds": 12.34567,
    "tokens_per_second": 6220.8,
    "flops": 5.5e9,
    "dense_flops": 9.25e9,
    "perplexity": 20.0,
    "hardware": "a CPU, 2 threads",
    "processes": 2,
    "versions": {"python": "3.11.0", "torch": "2.13.0"},
    "arguments": {"learning_rate": 0.01, "optim": "adamw_torch", "per_device_train_batch_size": 4},
    "pictures": ["training.png", "block_map.png"],
    "history": [
        {"step": 400, "loss": 4.0, "dynsparse/coverage": 0.5, "dynsparse/topology_updates": 1},
        {"step": 400, "eval_loss": 3.5, "eval_runtime": 1.0, "eval_samples_per_second": 9.0},
        {"step": 1200, "loss": 3.0, "dynsparse/coverage": 0.625, "dynsparse/topology_updates": 3},
        {"step": 1200, "eval_loss": 2.995732},
    ],
    "topology": {"num_updates": 3, "prune_score": "l1", "pruning_ratio": 0.5, "readmit": False, "save_to": None},
}


def card(create: Callable[[], ModelCard]) -> Callable[[], ModelCard]:
    CARDS[create.__name__] = create
    return create


def unexplored(**facts: Any) -> dict[str, Any]:
    """The run without topology updates."""
    log = [{name: value for name, value in entry.items() if "dynsparse" not in name} for entry in RUN["history"]]
    return RUN | {"history": log, "topology": None, "pictures": []} | facts


@card
def saved() -> ModelCard:
    """Without a run. Layers of one kind differ in density, and two kinds in their blocks."""
    nnzb = {f"layer.{number}.attention.self.query": 16 + 16 * number for number in range(2)}
    nnzb["layer.0.attention.self.key"] = 8
    return create_model_card(toy_model(nnzb=nnzb, block_size={"*key": 8, "*": 4}))


@card
def pretrained() -> ModelCard:
    evaluated = {"context_gain": 1.25, "plateau_left_tokens": 51200, "plateau_left_seconds": 8.0}
    log = [entry | ({"eval_context_gain": 1.25} if "eval_loss" in entry else {}) for entry in RUN["history"]]
    return create_model_card(toy_model(), **RUN | evaluated | {"history": log})


@card
def dense() -> ModelCard:
    return create_model_card(toy_model(sparsity=0), **unexplored())


@card
def pruned() -> ModelCard:
    """Step by step, from a model with all its blocks; what the dense twin would cost has to be worked out."""
    start = describe_start("google-bert/bert-base-uncased")
    facts = {"pruned_to": 0.75, "pattern": "every block", "dense_flops": None}
    return create_model_card(toy_model(), **RUN | start | facts)


@card
def classifier() -> ModelCard:
    """Fine-tuned, with a teacher, on data of the Hub."""
    model = toy_model(cls=DynSparseBertForSequenceClassification)
    model.add_model_tags(["mine"])
    metrics = {"loss": 0.5, "accuracy": 0.75, "mm_accuracy": 0.7, "pearson": 0.25, "HasAns_f1": 0.5, "total": 12}
    data = describe_data("nyu-mll/glue", config="mnli", split="validation_matched") | {"name": "GLUE MNLI"}
    facts = {"mode": "locked", "teacher": "big", "metrics": metrics, "data": data, "tags": ["more"]}
    return create_model_card(model, **unexplored(**facts, repo_id="me/tuned", **describe_start("me/start")))


def quantized(embeddings: bool, **overrides: Any) -> Any:
    model = prepare_qat_(toy_model(cls=DynSparseBertForQuestionAnswering, **overrides), embeddings)
    model.train()(**{name: toy_batch()[name] for name in ("input_ids", "attention_mask")})
    return to_int8_(model)


@card
def int8() -> ModelCard:
    """Answers questions; word embeddings are int8 too."""
    data = describe_data("rajpurkar/squad_v2")
    return create_model_card(quantized(True), data=data, metrics={"exact": 50.0, "f1": 60.0, "total": 9})


@card
def int8_dense() -> ModelCard:
    return create_model_card(quantized(False, sparsity=0))


@card
def slimmed() -> ModelCard:
    """Dense, with heads and neurons of its own in each layer."""
    sizes = {"num_attention_heads": 4, "heads_per_layer": [1, 3], "intermediate_sizes": [12, 64]}
    ticket = {"heads": [1, 3], "num_heads": [4, 4], "neurons": [12, 64], "num_neurons": [64, 64]}
    facts = unexplored(earlybert=ticket | {"step": 30, "reason": "fallback"}, pictures=["ticket.png"])
    return create_model_card(toy_model(sparsity=0, **sizes), **facts)


@card
def other_architecture() -> ModelCard:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = RobertaConfig(vocab_size=64, max_position_embeddings=40, **sizes)
    return create_model_card(sparsify_(RobertaForMaskedLM(config), block_size=(4, 8), sparsity=0.75))


def main() -> None:
    """Write the cards as they are now."""
    GOLDEN.mkdir(exist_ok=True)
    for kind, create in CARDS.items():
        (GOLDEN / f"{kind}.md").write_text(f"{create()}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
