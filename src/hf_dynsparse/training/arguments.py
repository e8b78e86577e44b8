"""What a run does with the topology and its kernels: `DynSparseTrainingArguments`."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from transformers import SchedulerType, TrainingArguments

from .._transformers import OptimizerNames
from ..ops.choice import TUNING_MODES
from ..topology import ALLOCATIONS, METHODS, PRUNE_SCORES, REGROW_RULES, SCHEDULES, TopologySettings, method_settings
from .distillation import DISTILLATION_POSITIONS, check_distillation
from .rewinding import check_rewinding, rewinding


# Choices are the tables themselves: what is added to one can be chosen.

# A flag that may be left out, `--readmit`, or `--readmit false`: the parser knows two of these by itself.
SWITCH: dict[str, Any] = {"nargs": "?", "const": True}

# Arguments that a method governs, and what `TopologySettings` calls them.
METHOD_FLAGS = {
    "num_topology_updates": "num_updates",
    "topology_update_every": "update_every",
    "topology_first_step": "first_step",
    "topology_last_step": "last_step",
    "pruning_ratio": "pruning_ratio",
    "prune_score": "prune_score",
    "regrow_rule": "regrow_rule",
    "pruning_schedule": "schedule",
    "readmit": "readmit",
    "replace_step": "replace_step",
    "density_schedule": "density_schedule",
    "initial_sparsity": "initial_sparsity",
    "final_sparsity": "final_sparsity",
    "density_begin": "density_begin",
    "density_end": "density_end",
    "shrink_counts": "shrink_counts",
    "allocation": "allocation",
    "hidden_copy": "hidden_copy",
}

_RENAMED = {setting: flag for flag, setting in METHOD_FLAGS.items() if flag != setting}
_SETTING = re.compile(rf"`({'|'.join(_RENAMED)})`|\b({'|'.join(_RENAMED)})(?==)")

BLOCK_AGE_OPTIMIZERS = (OptimizerNames.ADAMW_TORCH_FUSED, OptimizerNames.ADAMW_TORCH)


@contextmanager
def naming_arguments() -> Iterator[None]:
    """Errors about topology settings call them what the arguments are called."""
    try:
        yield
    except ValueError as error:
        text = _SETTING.sub(lambda found: found[0].replace(name := found[1] or found[2], _RENAMED[name]), str(error))
        raise ValueError(text) from None


@dataclass
class DynSparseTrainingArguments(TrainingArguments):
    """
    [`~transformers.TrainingArguments`] with the paper's optimiser defaults (arXiv:2108.06277, section 3) and the
    arguments of topology updates. What the model *is* (sparsity, block size) stands in its configuration.

    `method` names a preset of topology settings (see `hf_dynsparse.topology.METHODS`), for arguments that are not
    given. What is given wins; `topology_settings()` tells the outcome.

    Raises:
        ValueError: for an unknown method, score, rule or schedule, or a number out of range.
    """

    method: str = field(
        default="dynsparse",
        metadata={
            "help": "Method of sparse training: a preset of the topology arguments below. Those given explicitly win.",
            "choices": METHODS,
        },
    )
    num_topology_updates: int | None = field(
        default=None,
        metadata={
            "help": "Topology updates in the whole run, evenly spaced; 0 keeps the pattern fixed (static). Default: "
            "80, or as many as leave 100 steps between them, for new blocks to grow; one in a run of less than 300. "
            "The paper's best at sparsity 0.9: 160 for single weights, 80 for 16x16 blocks."
        },
    )
    topology_update_every: float | None = field(
        default=None,
        metadata={
            "help": "Update every so many optimiser steps (below 1: a share of the run) instead of a number of times "
            "per run."
        },
    )
    topology_first_step: float | None = field(
        default=None, metadata={"help": "No topology update before this step (below 1: this share of the run)."}
    )
    topology_last_step: float | None = field(
        default=None, metadata={"help": "No topology update after this step (below 1: this share of the run)."}
    )
    pruning_ratio: float | None = field(
        default=None,
        metadata={
            "help": "Share of active blocks that the first update replaces. DynSparse: 0.5; 0.75 is better at "
            "sparsity 0.99."
        },
    )
    pruning_schedule: str | None = field(
        default=None,
        metadata={
            "help": "How the pruning ratio decays over the updates. DynSparse: cosine.",
            "choices": SCHEDULES,
        },
    )
    prune_score: str | None = field(
        default=None,
        metadata={
            "help": "Active blocks with the lowest score are pruned: a norm of their values (DynSparse: l1), the same "
            "with the newest spared (l1_patient), |w g| (weight_gradient), |w| + 0.01 |g| (mest), the dense gradient, "
            "or any (random).",
            "choices": PRUNE_SCORES,
        },
    )
    regrow_rule: str | None = field(
        default=None,
        metadata={
            "help": "Where new blocks grow: anywhere (random: DynSparse), where none was yet (unfired), where rows "
            "and columns are emptiest (balanced), at the largest dense gradient (gradient: RigL), the same freed of "
            "the scale of inputs (gradient_normalised) and of outputs (correlation), or of four blocks three by "
            "gradient and one anywhere (gradient_random: MST).",
            "choices": REGROW_RULES,
        },
    )
    readmit: bool | None = field(
        default=None,
        metadata={"help": "A block pruned in an update may return in the same update (RigL's rule).", **SWITCH},
    )
    replace_step: bool | None = field(
        default=None,
        metadata={"help": "A topology update takes the place of an optimiser step (RigL's rule).", **SWITCH},
    )
    density_schedule: str | None = field(
        default=None,
        metadata={
            "help": "How the density changes in topology updates: 'constant', 'cubic' (gradual pruning), or phases "
            "'0:1,0.3:0,0.8:1' of progress:share, where share 0 is the density of the model's configuration and 1 "
            "that of --initial_sparsity. Layers have the shapes of their density at any time."
        },
    )
    initial_sparsity: float | None = field(
        default=None, metadata={"help": "Sparsity that the density schedule starts from; 0 is dense."}
    )
    final_sparsity: float | None = field(
        default=None,
        metadata={
            "help": "Sparsity that the density schedule leads to, from that of the model: a trained one is pruned "
            "step by step. Instead of --initial_sparsity."
        },
    )
    density_begin: float | None = field(
        default=None,
        metadata={"help": "Share of the run before which the cubic schedule stays at the initial density."},
    )
    density_end: float | None = field(
        default=None, metadata={"help": "Share of the run from which the cubic schedule stays at the final density."}
    )
    shrink_counts: bool | None = field(
        default=None,
        metadata={
            "help": "Blocks pruned for a smaller density count as replaced, instead of coming on top (MST).",
            **SWITCH,
        },
    )
    allocation: str | None = field(
        default=None,
        metadata={
            "help": "Which layers have how many blocks: as each was built (layer), the highest prune scores of all "
            "layers (global: GraNet), or regrown by the mean gradient momentum of layers (momentum: SNFS).",
            "choices": list(ALLOCATIONS),
        },
    )
    hidden_copy: bool | None = field(
        default=None,
        metadata={
            "help": "Remember pruned blocks: they return with their last values when active ones have shrunk below "
            "them (Prune Once for All). For schedules of the density without regrowth.",
            **SWITCH,
        },
    )
    regrow_std: float = field(
        default=0.0,
        metadata={
            "help": "Standard deviation of the values of new blocks, for example a tenth of the model's "
            "`initializer_range`; 0 starts them at zero, so that an update changes no output."
        },
    )
    group_lasso: float = field(
        default=0.0, metadata={"help": "Strength of the decoupled group lasso on blocks; 0 turns it off."}
    )

    dense_learning_rate: float | None = field(
        default=None,
        metadata={
            "help": "Learning rate of all parameters outside sparse layers: embeddings, norms, biases, head. Default: "
            "the same."
        },
    )
    block_age_adam: bool = field(
        default=False,
        metadata={
            "help": "AdamW corrects the bias of moments by the age of each block; else the first steps of a new block "
            "are several times too long."
        },
    )
    learning_rate_rewinding: bool = field(
        default=False,
        metadata={
            "help": "While the density falls along a cubic, each topology update takes the learning rate back to near "
            "its peak; the linear decay is for the steps outside of that window."
        },
    )
    new_block_warmup: int = field(
        default=0,
        metadata={"help": "With --block_age_adam: steps over which the learning rate of a new block rises."},
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
    distillation_positions: str = field(
        default="labelled",
        metadata={
            "help": "Where the logits of tokens are compared: where there is a label (labelled), or at all tokens "
            "that are not padding (all).",
            "choices": list(DISTILLATION_POSITIONS),
        },
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
        self.check_topology()
        if self.num_topology_updates is not None and self.num_topology_updates < 0:
            raise ValueError(f"`num_topology_updates` must not be negative. Got {self.num_topology_updates}.")
        if self.num_topology_updates is not None and self.topology_update_every is not None:
            raise ValueError(
                "Give `num_topology_updates` or `topology_update_every`, not both. "
                f"Got {self.num_topology_updates} and {self.topology_update_every}."
            )
        if self.kernel_tuning not in TUNING_MODES:
            raise ValueError(f"`kernel_tuning` must be one of {', '.join(TUNING_MODES)}. Got {self.kernel_tuning!r}.")
        how = self.distillation_temperature, self.distillation_weight, self.distillation_positions
        check_distillation(*how, prefix="distillation_")
        if self.group_lasso < 0:
            raise ValueError(f"`group_lasso` must not be negative. Got {self.group_lasso}.")
        super().__post_init__()
        self._check_optimizer()

    def check_topology(self) -> None:
        """
        Raises:
            ValueError: for topology settings out of range, or that exclude each other.
        """
        with naming_arguments():
            settings = self.topology_settings()
            del settings["group_lasso"]
            TopologySettings(**settings)

    def _check_optimizer(self) -> None:
        if self.dense_learning_rate is not None and self.dense_learning_rate < 0:
            raise ValueError(f"`dense_learning_rate` must not be negative. Got {self.dense_learning_rate}.")
        if self.new_block_warmup < 0:
            raise ValueError(f"`new_block_warmup` must not be negative. Got {self.new_block_warmup}.")
        if self.new_block_warmup and not self.block_age_adam:
            raise ValueError(
                f"`new_block_warmup` goes by the ages of blocks. Got {self.new_block_warmup} without them: give "
                "`block_age_adam=True` too."
            )
        if self.learning_rate_rewinding:
            settings = self.topology_settings()
            check_rewinding(settings)
            if self.max_steps > 0:
                rewinding(settings, self.max_steps, self.get_warmup_steps(self.max_steps))
            if self.lr_scheduler_type != SchedulerType.LINEAR:
                raise ValueError(
                    "`learning_rate_rewinding` is a linear decay of its own. Got lr_scheduler_type="
                    f"{str(SchedulerType(self.lr_scheduler_type).value)!r}. Leave one of them out."
                )
        if self.block_age_adam and self.optim not in BLOCK_AGE_OPTIMIZERS:
            names = " or ".join(optimizer.value for optimizer in BLOCK_AGE_OPTIMIZERS)
            raise ValueError(
                f"`block_age_adam` is a kind of AdamW: `optim` must be {names}. Got "
                f"{OptimizerNames(self.optim).value}. Leave it out."
            )

    def topology_settings(self) -> dict[str, Any]:
        """The keyword arguments of `TopologyCallback`: those of the method, and what is given explicitly."""
        given = {setting: getattr(self, flag) for flag, setting in METHOD_FLAGS.items()}
        return {
            **method_settings(self.method, given),
            "regrow_std": self.regrow_std,
            "group_lasso": self.group_lasso,
            "seed": self.seed,
        }
