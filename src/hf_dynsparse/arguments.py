"""What a run does with the topology and its kernels: `DynSparseTrainingArguments`."""

from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments

from .distillation import check_distillation
from .ops.choice import TUNING_MODES
from .topology import PRUNE_SCORES, REGROW_RULES, SCHEDULES, pruning_ratio_at
from .topology.scores import resolve_score


@dataclass
class DynSparseTrainingArguments(TrainingArguments):
    """
    [`~transformers.TrainingArguments`] with the paper's optimiser defaults (arXiv:2108.06277, section 3) and the
    arguments of topology updates. What the model *is* (sparsity, block size) stands in its configuration.

    Raises:
        ValueError: for an unknown score, rule or schedule, or a number out of range.
    """

    num_topology_updates: int | None = field(
        default=None,
        metadata={
            "help": "Topology updates in the whole run, evenly spaced; 0 keeps the pattern fixed (static). Default: "
            "80, or one every five steps in a short run. The paper's best at sparsity 0.9: 160 for single weights, 80 "
            "for 16x16 blocks."
        },
    )
    topology_update_every: int | None = field(
        default=None, metadata={"help": "Update every so many optimiser steps instead of a number of times per run."}
    )
    topology_first_step: int | None = field(default=None, metadata={"help": "No topology update before this step."})
    topology_last_step: int | None = field(default=None, metadata={"help": "No topology update after this step."})
    pruning_ratio: float = field(
        default=0.5,
        metadata={"help": "Share of active blocks that the first update replaces; 0.75 is better at sparsity 0.99."},
    )
    pruning_schedule: str = field(
        default="cosine",
        metadata={"help": "How the pruning ratio decays over the updates.", "choices": list(SCHEDULES)},
    )
    prune_score: str = field(
        default="l1",
        metadata={"help": "Active blocks with the lowest score are pruned.", "choices": list(PRUNE_SCORES)},
    )
    regrow_rule: str = field(
        default="random",
        metadata={
            "help": "Where new blocks grow: anywhere, at the largest dense gradient (RigL), or where none was yet.",
            "choices": list(REGROW_RULES),
        },
    )
    readmit: bool = field(
        default=False, metadata={"help": "A block pruned in an update may return in the same update (RigL's rule)."}
    )
    group_lasso: float = field(
        default=0.0, metadata={"help": "Strength of the decoupled group lasso on blocks; 0 turns it off."}
    )

    teacher: str | None = field(
        default=None,
        metadata={
            "help": "A model to learn from beside the labels (knowledge distillation), of the same task and "
            "tokenizer: a folder or Hub name."
        },
    )
    distillation_temperature: float = field(
        default=2.0, metadata={"help": "Divides the logits of teacher and student before they are compared."}
    )
    distillation_weight: float = field(
        default=0.5, metadata={"help": "Share of the teacher in the loss; 1 leaves the labels out."}
    )

    kernel_tuning: str = field(
        default="once",
        metadata={
            "help": "How the backend of each product is chosen: 'once' times the candidates when a product is first "
            "met and keeps the result on disk for this machine; 'force' times them again; 'off' goes by a fixed rule.",
            "choices": list(TUNING_MODES),
        },
    )
    dense_workspace: bool = field(
        default=True,
        metadata={
            "help": "A dense weight may exist for the time of one product where that is faster (high density, or no "
            "kernels for this machine). Without it no dense weight or gradient is ever made."
        },
    )
    seeded_dropout: bool = field(
        default=True,
        metadata={
            "help": "On a processor, draw dropout masks by a hash of a seed instead of a serial generator: ten "
            "times as fast, and no mask is stored. The same distribution, other draws."
        },
    )
    keep_freed_memory: bool = field(
        default=False,
        metadata={
            "help": "Let the allocator keep freed buffers instead of giving them back and mapping them anew at every "
            "step: faster on CPUs, for the whole process. Needs glibc."
        },
    )

    # The paper's optimiser (arXiv:2108.06277, section 3); 10,000 of 757,000 steps are warm-up.
    adam_epsilon: float = field(default=1e-6, metadata={"help": "Epsilon of AdamW."})
    weight_decay: float = field(default=0.01, metadata={"help": "Decoupled weight decay; not for biases and norms."})
    warmup_steps: float = field(
        default=0.0132, metadata={"help": "Linear warm-up: a number of steps, or below 1 a share of the run."}
    )
    # Broadcasting buffers would hide ranks that disagree about the topology; they are compared instead.
    ddp_broadcast_buffers: bool | None = field(default=False, metadata={"help": "See `torch` DDP; keep it off."})
    ddp_find_unused_parameters: bool | None = field(default=False, metadata={"help": "See `torch` DDP."})

    def __post_init__(self) -> None:
        resolve_score(self.prune_score, "prune_score", PRUNE_SCORES)
        resolve_score(self.regrow_rule, "regrow_rule", REGROW_RULES)
        pruning_ratio_at(0, 1, self.pruning_ratio, self.pruning_schedule)
        if self.num_topology_updates is not None and self.num_topology_updates < 0:
            raise ValueError(f"`num_topology_updates` must not be negative. Got {self.num_topology_updates}.")
        if self.num_topology_updates is not None and self.topology_update_every is not None:
            raise ValueError(
                "Give `num_topology_updates` or `topology_update_every`, not both. "
                f"Got {self.num_topology_updates} and {self.topology_update_every}."
            )
        if self.kernel_tuning not in TUNING_MODES:
            raise ValueError(f"`kernel_tuning` must be one of {', '.join(TUNING_MODES)}. Got {self.kernel_tuning!r}.")
        check_distillation(self.distillation_temperature, self.distillation_weight)
        if self.group_lasso < 0:
            raise ValueError(f"`group_lasso` must not be negative. Got {self.group_lasso}.")
        super().__post_init__()

    def topology_settings(self) -> dict[str, Any]:
        """The keyword arguments of `TopologyCallback`."""
        return {
            "num_updates": self.num_topology_updates,
            "update_every": self.topology_update_every,
            "first_step": self.topology_first_step,
            "last_step": self.topology_last_step,
            "pruning_ratio": self.pruning_ratio,
            "prune_score": self.prune_score,
            "regrow_rule": self.regrow_rule,
            "schedule": self.pruning_schedule,
            "readmit": self.readmit,
            "group_lasso": self.group_lasso,
            "seed": self.seed,
        }
