"""What a pre-training run will take and reach, from its configuration alone: nothing is allocated, nothing trained."""

from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from transformers import AutoModelForMaskedLM, PretrainedConfig, PreTrainedModel

from ..models.bert.configuration_dynsparse_bert import PRESETS
from ..models.density import sparsity_of
from ..models.flops import dense_flops_per_sequence, flops_per_sequence, matrix_entries
from ..nn.linear import sparse_layers
from ..optim.groups import sparse_learning_rate
from ..topology import default_num_updates, pruning_ratio_at, update_steps
from ..topology.counts import replaced_count
from .layers import model_facts
from .tables import plain_table


# Best of the paper's sweeps for its dense models (arXiv:2108.06277, appendix), by preset.
DENSE_LEARNING_RATES = {"mini": 8e-4, "small": 4e-4, "medium": 2e-4, "base": 2e-4}

# Tokens that a pre-training run needs to learn more than the frequencies of words. Measured: BERT-Mini, sparsity 0.9,
# a vocabulary of 8,192, with the distance bias in attention; without the bias it takes more.
PLATEAU_TOKENS = 900_000


@dataclass(frozen=True)
class Footprint:
    """
    What a model, or a part of one, takes while AdamW trains it in float32.

    Args:
        parameters (`int`): trainable entries; tied ones count once.
        index_bytes (`int`): of block indices.
    """

    parameters: int
    index_bytes: int

    @property
    def checkpoint_bytes(self) -> int:
        """Of parameters and block indices: the tensors of a saved model, without the headers of its files."""
        return 4 * self.parameters + self.index_bytes

    @property
    def moment_bytes(self) -> int:
        """Of both moments of AdamW."""
        return 8 * self.parameters

    @property
    def training_bytes(self) -> int:
        """Of parameters, block indices, gradients and moments. Activations come on top."""
        return self.checkpoint_bytes + 4 * self.parameters + self.moment_bytes


@dataclass(frozen=True)
class RunEstimate:
    """
    What [`estimate_run`] finds; `print` shows it as a table.

    Args:
        model, dense_model (`Footprint`): the model with a head for masked language modelling, and its dense twin.
        encoder, dense_encoder (`Footprint`): the matrices of the encoder alone, which are what is sparse.
        flops, dense_flops (`int`): of training on one sequence.
        sequences (`int`): that the run trains on; 0 if unknown.
        num_topology_updates (`int`): of the run.
        coverage (`float`): DOF coverage to expect at its end.
        learning_rate_factor (`float`): what to multiply the dense model's learning rate by.
        learning_rate (`float`, *optional*): the product, if the dense model's is known.
    """

    model: Footprint
    dense_model: Footprint
    encoder: Footprint
    dense_encoder: Footprint
    flops: int
    dense_flops: int
    sequences: int
    num_topology_updates: int
    coverage: float
    learning_rate_factor: float
    learning_rate: float | None

    def amounts(self) -> dict[str, tuple[int, int]]:
        """By name: of the sparse model, and of its dense twin."""
        pairs = {"": (self.model, self.dense_model), "encoder_": (self.encoder, self.dense_encoder)}
        names = ("parameters", "index_bytes", "checkpoint_bytes", "moment_bytes", "training_bytes")
        amounts = {
            f"{part}{name}": (getattr(sparse, name), getattr(dense, name))
            for part, (sparse, dense) in pairs.items()
            for name in names
        }
        amounts["flops_per_sequence"] = self.flops, self.dense_flops
        if self.sequences:
            amounts["training_flops"] = self.flops * self.sequences, self.dense_flops * self.sequences
        return amounts

    def to_dict(self) -> dict[str, Any]:
        """What JSON can hold of it: all."""
        sparse = {name: amount for name, (amount, _) in self.amounts().items()}
        dense = {name: amount for name, (_, amount) in self.amounts().items()}
        names = ("num_topology_updates", "coverage", "learning_rate_factor", "learning_rate")
        return {"sparse": sparse, "dense": dense, **{name: getattr(self, name) for name in names}}

    def __str__(self) -> str:
        rows = [["", "sparse", "dense", "of dense"]]
        for name, (sparse, dense) in self.amounts().items():
            label = name.replace("_", " ").replace("flops", "FLOPs")
            digits = ".4g" if "flops" in name else ",d"
            rows.append([label, f"{sparse:{digits}}", f"{dense:{digits}}", f"{sparse / dense:.3f}" if dense else ""])
        lines = [plain_table(rows, least=(28, 16, 16))]
        lines.append(
            f"DOF coverage {self.coverage:.1%} to be expected after {self.num_topology_updates} topology updates"
        )
        rate = "" if self.learning_rate is None else f": {self.learning_rate:.3g}"
        lines.append(f"learning rate {self.learning_rate_factor:.2f} times that of the dense model{rate}")
        return "\n".join(lines)


def estimate_run(
    config: PretrainedConfig | PreTrainedModel,
    *,
    seq_len: int = 128,
    max_steps: int | None = None,
    batch_size: int | None = None,
    num_topology_updates: int | None = None,
    pruning_ratio: float = 0.5,
    pruning_schedule: str = "cosine",
    readmit: bool = False,
    dense_learning_rate: float | None = None,
) -> RunEstimate:
    """
    Estimate what pre-training a model will take and reach, before anything is trained.

    Args:
        config (`DynSparseBertConfig`, or `PreTrainedModel`): the model; one of another architecture as it is, on the
            meta device for instance, where [`sparse_from_config`] builds it without memory.
        seq_len (`int`): tokens per sequence.
        max_steps, batch_size (`int`, *optional*): optimiser steps of the run, and sequences in each; together they
            give its FLOPs.
        num_topology_updates (`int`, *optional*): as many as the Trainer would make by default: 80, or as many as leave
            100 steps between them.
        pruning_ratio, pruning_schedule, readmit: see [`TopologyUpdater`]; regrowth is random.
        dense_learning_rate (`float`, *optional*): that of the dense twin. By default the best in the paper's sweeps,
            if they have a BERT of this depth and width: mini, small, medium or base.

    Raises:
        ValueError: for an argument out of range, or updates that do not fit into the run.

    Example:
        ```python
        >>> estimate = estimate_run(DynSparseBertConfig.preset("base", sparsity=0.9, block_size=16))
        >>> round(estimate.learning_rate, 5)
        0.00128
        ```
    """
    model: Any = config
    if isinstance(config, PretrainedConfig):
        with torch.device("meta"):
            model = AutoModelForMaskedLM.from_config(config)
    if num_topology_updates is None:
        num_topology_updates = 80 if max_steps is None else default_num_updates(max_steps)
    if max_steps is not None:
        update_steps(max_steps, num_topology_updates)  # refuses what does not fit
    if dense_learning_rate is None:
        rates = {PRESETS[name][:2]: rate for name, rate in DENSE_LEARNING_RATES.items()}
        dense_learning_rate = rates.get((model.config.num_hidden_layers, model.config.hidden_size))
    size, layers = model_facts(model), sparse_layers(model).values()
    index_bytes = 4 * sum(layer.nnzb for layer in layers)
    updates = num_topology_updates, pruning_ratio, pruning_schedule, readmit
    factor = sparse_learning_rate(1.0, sparsity_of(model))
    return RunEstimate(
        Footprint(size.parameters, index_bytes),
        Footprint(size.dense_parameters, 0),
        Footprint(matrix_entries(model), index_bytes),
        Footprint(matrix_entries(model, dense=True), 0),
        flops_per_sequence(model, seq_len),
        dense_flops_per_sequence(model, seq_len),
        (max_steps or 0) * (batch_size or 0),
        num_topology_updates,
        fmean([expected_coverage(layer.nnzb, layer.num_blocks, *updates) for layer in layers] or [1.0]),
        factor,
        None if dense_learning_rate is None else factor * dense_learning_rate,
    )


def plateau_warning(tokens: int) -> str | None:
    """One line for a run of so many tokens that is likely to learn nothing but how frequent words are, or `None`."""
    if not 0 < tokens < PLATEAU_TOKENS:
        return None
    return (
        f"A run of {tokens:,} tokens is likely to end as a table of word frequencies: BERT-Mini with a vocabulary of "
        f"8k and the distance bias needs about {PLATEAU_TOKENS:,} before it uses the words around. Give more steps or "
        "a larger batch."
    )


def expected_coverage(
    nnzb: int,
    num_blocks: int,
    num_updates: int,
    pruning_ratio: float = 0.5,
    pruning_schedule: str = "cosine",
    readmit: bool = False,
) -> float:
    """
    DOF coverage of one tensor to be expected after all updates of a run with random regrowth:
    `1 - (1 - f) * prod_t(1 - k_t / m_t)`, of the `m_t` positions open to the `k_t` new blocks of update `t`
    (arXiv:2108.06277, section 4).

    Args:
        nnzb, num_blocks (`int`): active blocks, and positions a block can take.
        num_updates, pruning_ratio, pruning_schedule, readmit: see [`TopologyUpdater`].
    """
    free = num_blocks - nnzb
    missed = free / num_blocks
    for update in range(num_updates):
        ratio = pruning_ratio_at(update, num_updates, pruning_ratio, pruning_schedule)
        replaced = replaced_count(ratio, nnzb, num_blocks, readmit)
        missed *= 1.0 - replaced / max(1, free + replaced * readmit)
    return 1.0 - missed
