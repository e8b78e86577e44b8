"""The BERTs that are compared, alike in all but the linear layers of the encoder, and the check of a sparse one."""

import argparse
from dataclasses import dataclass
from typing import Any

import torch
from _cli import SEED, BlockSize, block_size, label
from _layers import MaskedLinear, require_close
from torch import nn
from transformers import BertForMaskedLM, BertModel, PreTrainedModel

from hf_dynsparse import (
    DynSparseBertConfig,
    DynSparseBertForMaskedLM,
    DynSparseBertModel,
    sparse_layers,
    topology_summary,
)
from hf_dynsparse.models.bert.configuration_dynsparse_bert import PRESETS
from hf_dynsparse.ops import take_blocks


# Through a whole model, both sides rounded to that dtype at every layer.
TOLERANCE = {"float32": 1e-4, "bfloat16": 1e-1, "int8": 1e-1}

# Shapes that are measured beside the presets of the package: (layers, hidden, heads, intermediate).
SHAPES = PRESETS | {"minilm": (6, 384, 12, 1536)}

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Arm:
    """One side of a comparison: `dense` (our code), `stock` (transformers), `masked dense` or `sparse`."""

    kind: str
    preset: str
    sparsity: float = 0.0
    block_size: BlockSize | None = None
    position_bias: str | None = None

    @property
    def name(self) -> str:
        """As printed."""
        block = "" if self.block_size is None else f" B={label(self.block_size)}"
        bias = "" if self.position_bias is None else f" + {self.position_bias}"
        return f"{self.preset} {self.kind}" + (f" s={self.sparsity:g}{block}" if self.sparsity else "") + bias


def add_model_arguments(parser: argparse.ArgumentParser, preset: str, sizes: list[int]) -> None:
    """The flags that choose the models."""
    parser.add_argument("--preset", choices=tuple(SHAPES), default=preset, help="size of the BERT (%(default)s)")
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.9], help="shares of inactive positions (0.9)")
    parser.add_argument("--vocab_size", type=int, default=30522, help="size of the vocabulary (%(default)s)")
    listed = " ".join(map(str, sizes))
    parser.add_argument(
        "--block_size", type=block_size, nargs="+", default=sizes, help=f"sides, or rows x columns ({listed})"
    )


def make_config(arm: Arm, vocab_size: int, seq_len: int, dropout: float | None) -> DynSparseBertConfig:
    """The arm's configuration; without `dropout` the preset's."""
    options: dict[str, Any] = {} if arm.block_size is None else {"block_size": arm.block_size}
    if arm.preset not in PRESETS:
        names = "num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size"
        options |= dict(zip(names, SHAPES[arm.preset], strict=True))
    if dropout is not None:
        options |= {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    if arm.position_bias is not None:
        options["position_bias"] = arm.position_bias
    sparsity = arm.sparsity if arm.kind == "sparse" else 0.0
    length = max(512, seq_len)
    return DynSparseBertConfig.preset(
        arm.preset if arm.preset in PRESETS else "base",
        sparsity=sparsity,
        vocab_size=vocab_size,
        max_position_embeddings=length,
        **options,
    )


def build_model(arm: Arm, config: DynSparseBertConfig, head: bool) -> PreTrainedModel:
    """The arm's model, with the head of masked language modelling or as a bare encoder."""
    torch.manual_seed(SEED)
    if arm.kind == "stock":
        return (BertForMaskedLM if head else BertModel)(config.to_stock())
    model = (DynSparseBertForMaskedLM if head else DynSparseBertModel)(config)
    if arm.kind == "masked dense":
        for name, module in list(model.named_modules()):
            if "encoder.layer." in name and isinstance(module, nn.Linear):
                model.set_submodule(name, MaskedLinear(module, arm.sparsity))
    with torch.no_grad():
        for layer in sparse_layers(model).values():
            layer.values.mul_(10)  # as drawn they hardly change the output, and the check would see little of them
    return model


def make_batch(batch: int, seq_len: int, vocab_size: int, device: torch.device) -> Batch:
    """Random tokens; the labels name 15 % of them."""
    generator = torch.Generator().manual_seed(SEED)
    input_ids = torch.randint(5, vocab_size, (batch, seq_len), generator=generator)
    masked = torch.rand(batch, seq_len, generator=generator) < 0.15
    masked[:, 1] = True  # at least one
    return {"input_ids": input_ids.to(device), "labels": torch.where(masked, input_ids, -100).to(device)}


def backend_of(model: nn.Module) -> str:
    """What serves the sparse layers; `dense` where there are none."""
    return ", ".join(sorted({layer.backend for layer in topology_summary(model).layers})) or "dense"


def check_training(model: PreTrainedModel, batch: Batch, dtype: str) -> None:
    """
    Compare a sparse model with the stock model of the same weights: loss, gradient of the embeddings (through every
    layer) and of all values. Dropout is off, the head is the one that is timed.

    Raises:
        ValueError: if one differs by more than rounding.
    """
    dense = model.to_dense().eval()
    model.eval().training = True  # of the root alone: the head at masked positions, but no dropout below
    losses = []
    for side in (model, dense):
        with torch.autocast(batch["labels"].device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
            losses.append(side(**batch).loss)
        losses[-1].backward()
    embeddings = [side.get_input_embeddings().weight.grad for side in (model, dense)]
    values: list[list[torch.Tensor]] = [[], []]  # of all layers together: some gradients are all but zero
    for name, layer in sparse_layers(model).items():
        wanted = take_blocks(dense.get_submodule(name).weight.grad, layer.block_index, layer.block_shape)
        values[0].append(layer.values.grad.flatten())
        values[1].append(wanted.flatten())
    require_close("the loss", losses[0], losses[1], TOLERANCE[dtype])
    require_close("the gradient of the embeddings", embeddings[0], embeddings[1], TOLERANCE[dtype])
    require_close("the gradients of all values", torch.cat(values[0]), torch.cat(values[1]), TOLERANCE[dtype])
    model.zero_grad()
    model.train()
