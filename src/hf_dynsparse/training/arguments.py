"""What a run does with the topology and its kernels: `DynSparseTrainingArguments`."""

from dataclasses import dataclass, field
from typing import Any

from transformers import SchedulerType, TrainingArguments

from .._transformers import OptimizerNames
from ..ops.choice import TUNING_MODES
from ..topology import METHODS, TopologyOptions
from ..topology.settings import option
from .callbacks.distance_bias import parse_distance_bias
from .curriculum import Curriculum
from .distillation import DISTILLATION_POSITIONS, TEACHER_DTYPES, check_distillation
from .hidden_states import check_layers
from .relations import check_relations
from .rewinding import check_rewinding, rewinding


BLOCK_AGE_OPTIMIZERS = (OptimizerNames.ADAMW_TORCH_FUSED, OptimizerNames.ADAMW_TORCH)


@dataclass
class DynSparseTrainingArguments(TopologyOptions, TrainingArguments):
    """
    [`~transformers.TrainingArguments`] with the paper's optimiser defaults (arXiv:2108.06277, section 3) and the
    arguments of topology updates. What the model *is* (sparsity, block size) is said by its configuration.

    `method` names a preset of topology settings (see `hf_dynsparse.topology.METHODS`), for arguments that are not
    given. What is given wins; `topology_settings()` tells the outcome.

    Raises:
        ValueError: for an unknown method, score, rule or schedule, or a number out of range.
    """

    seed: int = field(
        default=42, metadata={"help": "Random seed set at the start of training; topology updates draw by it too."}
    )
    group_lasso: float = field(
        default=0.0, metadata={"help": "Strength of the decoupled group lasso on blocks; 0 turns it off."}
    )

    dense_learning_rate: float | None = field(
        default=None,
        metadata={
            "help": "Learning rate of all parameters outside sparse layers (of a dense model: outside the matrices of "
            "its encoder): embeddings, norms, biases, head. Default: the same."
        },
    )
    block_age_adam: bool = option(
        "AdamW corrects the bias of moments by the age of each block; else the first steps of a new block "
        "are several times too long. Default: as the method says: smet does."
    )
    learning_rate_rewinding: bool = field(
        default=False,
        metadata={
            "help": "While the density falls along a cubic, each topology update takes the learning rate back to near "
            "its peak; the linear decay is for the steps outside of that window."
        },
    )
    new_block_warmup: int = option(
        "With --block_age_adam: steps over which the learning rate of a new block rises. Default: as the "
        "method says, else 0."
    )

    seq_length_schedule: str | None = field(
        default=None,
        metadata={
            "help": "Shorter sequences first: lengths and the shares of the run until which they hold, such as "
            "32:0.5,128. Packed text is cut; tokens a batch stay the same."
        },
    )
    mlm_probability_schedule: str | None = field(
        default=None,
        metadata={
            "help": "Share of words to predict in training, along a line from the start to the end of the run, such "
            "as 0.3:0.15; or one rate. Evaluation keeps to that of its collator."
        },
    )
    distance_bias: str | None = field(
        default=None,
        metadata={
            "help": "A bias of minus slope times distance in attention: with absolute positions alone a BERT stays "
            "at the frequencies of words for long. START:END@SHARE, or START: 1:0@0.7 falls from strength 1 to "
            "nothing at 0.7 of the run, and leaves a stock BERT; 1 stays, and is a part of the model."
        },
    )

    teacher: str | None = field(
        default=None,
        metadata={
            "help": "A model to learn from beside the labels (knowledge distillation), of the same task and "
            "tokenizer: a folder or Hub name. Default on a task: the dense checkpoint that --sparsity prunes, with "
            "--distillation_layers all, if it has learned that task; none: labels alone."
        },
    )
    teacher_dtype: str = field(
        default="float32",
        metadata={
            "help": "What the products of the teacher are computed in: bfloat16 takes a third of the time on CPUs "
            "that have it (AVX512-BF16, AMX) and on GPUs.",
            "choices": list(TEACHER_DTYPES),
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

    distillation_layers: str | None = field(
        default=None,
        metadata={
            "help": "With --teacher: learn its hidden states too, layer by layer: of all, or of a list such as 2,4,6; "
            "0 are the embeddings. Teacher and student must have the same width and depth."
        },
    )
    distillation_layers_weight: float = field(
        default=1.0,
        metadata={
            "help": "Factor of the loss of hidden states, which comes on top: the mean square error over the variance "
            "of the teacher's."
        },
    )

    distillation_relations: str | None = field(
        default=None,
        metadata={
            "help": "With --teacher: learn how queries, keys and values of one layer relate to each other (MiniLMv2): "
            "last, a number from 1 on, or those of student and teacher such as 6:11. Widths may differ."
        },
    )
    distillation_relations_weight: float = field(
        default=1.0,
        metadata={"help": "Factor of the loss of relations, which comes on top: the sum of three divergences."},
    )
    distillation_relation_heads: int | None = field(
        default=None,
        metadata={"help": "Into which queries, keys and values are split. Default: attention heads of the teacher."},
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
            "help": "On CPUs, draw dropout masks by a hash of a seed instead of a serial generator: ten "
            "times as fast, and no mask is stored. The same distribution, other draws."
        },
    )
    fused_passes: bool = field(
        default=True,
        metadata={
            "help": "On CPUs, compute what lies between the products of a BERT in fewer passes over memory: dropout, "
            "residual and normalisation as one, the loss without stored probabilities. The same to rounding. A "
            "resumed run goes on as it began."
        },
    )
    keep_freed_memory: bool | None = field(
        default=None,
        metadata={
            "help": "Let the allocator keep freed buffers instead of giving them back and mapping them anew at every "
            "step: faster on CPUs, for the whole process. Needs glibc. Default: in the scripts, on a CPU."
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
        Curriculum.of(self)  # refuses schedules that cannot be
        self.topology_settings()  # refuses what is out of range, or excludes each other
        if self.num_topology_updates is not None and self.num_topology_updates < 0:
            raise ValueError(f"`num_topology_updates` must not be negative. Got {self.num_topology_updates}.")
        if self.num_topology_updates is not None and self.topology_update_every is not None:
            raise ValueError(
                "Give `num_topology_updates` or `topology_update_every`, not both. "
                f"Got {self.num_topology_updates} and {self.topology_update_every}."
            )
        if self.distance_bias is not None:
            parse_distance_bias(self.distance_bias)
        if self.kernel_tuning not in TUNING_MODES:
            raise ValueError(f"`kernel_tuning` must be one of {', '.join(TUNING_MODES)}. Got {self.kernel_tuning!r}.")
        how = self.distillation_temperature, self.distillation_weight, self.distillation_positions
        check_distillation(*how, prefix="distillation_")
        if self.teacher_dtype not in TEACHER_DTYPES:
            raise ValueError(
                f"`teacher_dtype` must be one of {', '.join(TEACHER_DTYPES)}. Got {self.teacher_dtype!r}."
            )
        check_layers(self.distillation_layers, self.distillation_layers_weight, prefix="distillation_")
        check_relations(**self.relations, prefix="distillation_")
        if self.group_lasso < 0:
            raise ValueError(f"`group_lasso` must not be negative. Got {self.group_lasso}.")
        # What the method says of the optimiser; one without ages has no new blocks to warm up.
        preset = {} if self.block_age_adam is False else METHODS[self.method].arguments
        for name, default in {"block_age_adam": False, "new_block_warmup": 0}.items():
            if getattr(self, name) is None:
                setattr(self, name, preset.get(name, default))
        super().__post_init__()
        self._check_optimizer()

    @property
    def relations(self) -> dict[str, Any]:
        """Arguments of [`Distillation`]: what is learned of relations in attention."""
        names = "relations", "relations_weight", "relation_heads"
        return {name: getattr(self, f"distillation_{name}") for name in names}

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
