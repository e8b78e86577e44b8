"""A toy model, its tokenizer and its data, for every test that trains: a step takes milliseconds."""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import BertTokenizer, PreTrainedTokenizerFast

from hf_dynsparse import DynSparseBertConfig, DynSparseBertForMaskedLM, DynSparseTrainer, DynSparseTrainingArguments
from hf_dynsparse.data import DataCollatorForWholeWordMasking


SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = [f"w{i}" for i in range(44)] + [f"##p{i}" for i in range(15)]
PAD, UNK, CLS, SEP, MASK = range(5)

# Grids of 8 x 8, 16 x 8 and 8 x 16 blocks.
TOY_SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "vocab_size": len(SPECIAL + WORDS),
    "max_position_embeddings": 32,
    "block_size": 4,
    "sparsity": 0.75,
}


def toy_config(**overrides: Any) -> DynSparseBertConfig:
    return DynSparseBertConfig.preset("tiny", **{**TOY_SIZES, **overrides})


def toy_model(seed: int = 0, cls: type = DynSparseBertForMaskedLM, **overrides: Any) -> Any:
    """The same weights and topology for the same seed; the global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return cls(toy_config(**overrides))


def toy_tokenizer(more: Sequence[str] = ()) -> BertTokenizer:
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *WORDS, *more])}
    return BertTokenizer(vocab=vocabulary, model_max_length=32)


def without_post_processor(tokenizer: BertTokenizer, gap: int | None = None) -> PreTrainedTokenizerFast:
    """The same, but it adds no special tokens to a text; with one more token, of id `gap`, if that is given."""
    content = json.loads(tokenizer.backend_tokenizer.to_str()) | {"post_processor": None}
    if gap is not None:
        content["model"]["vocab"]["##gap"] = gap
    special = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    backend = Tokenizer.from_str(json.dumps(content))
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=tokenizer.model_max_length, **special)


def toy_collator(**arguments: Any) -> DataCollatorForWholeWordMasking:
    return DataCollatorForWholeWordMasking(toy_tokenizer(), mlm_probability=0.3, **arguments)


def toy_examples(count: int, length: int = 16, seed: int = 0) -> list[dict[str, list[int]]]:
    """Sentences whose words follow one another in order, so that there is something to learn."""
    draw = random.Random(seed)
    starts = [draw.randrange(44) for _ in range(count)]
    return [{"input_ids": [CLS, *(5 + (start + i) % 44 for i in range(length - 2)), SEP]} for start in starts]


def toy_batch(rows: int = 4, masked: int = 3, seed: int = 0) -> dict[str, torch.Tensor]:
    """A batch `[rows, 12]` with `masked` positions to predict in every row, and padding in the last."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 64, (rows, 12), generator=generator)
    labels, attention_mask = torch.full_like(ids, -100), torch.ones_like(ids)
    labels[:, 1 : 1 + masked] = ids[:, 1 : 1 + masked]
    ids[:, 1 : 1 + masked] = MASK
    attention_mask[-1, 9:] = 0
    return {"input_ids": ids, "attention_mask": attention_mask, "labels": labels}


def toy_arguments(folder: Path, **overrides: Any) -> DynSparseTrainingArguments:
    """Twelve steps of four sequences, two epochs of the 24 toy examples, updates at steps 3, 6 and 9."""
    defaults = {
        "kernel_tuning": "off",
        "max_steps": 12,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "learning_rate": 1e-2,
        "num_topology_updates": 3,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return DynSparseTrainingArguments(output_dir=str(folder), **{**defaults, **overrides})


def toy_trainer(folder: Path, model: Any = None, **overrides: Any) -> DynSparseTrainer:
    return DynSparseTrainer(
        toy_model() if model is None else model,
        toy_arguments(folder, **overrides),
        data_collator=toy_collator(),
        train_dataset=toy_examples(24),
        eval_dataset=toy_examples(6, seed=1),
    )
