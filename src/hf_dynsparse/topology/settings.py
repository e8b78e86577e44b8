"""What a run does with the topology: every option once, with its help, and what the options of a run amount to."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from ..blocks.sizes import check_sparsity
from .allocation import ALLOCATIONS
from .methods import DYNSPARSE, METHODS
from .records import RECORDS
from .schedules import (
    SCHEDULES,
    STEPS_TO_LIVE,
    PlannedUpdate,
    default_num_updates,
    density_share,
    pruning_ratio_at,
    update_steps,
)
from .scores import OBSERVED, OWN_NAMES, PRUNE_SCORES, REGROW_RULES, SCORES, check_regrow_std, resolve_score


# Two ways to say when, and where the density begins or ends: who gives one does not want the preset's other.
_EITHER = (
    frozenset({"num_topology_updates", "topology_update_every"}),
    frozenset({"initial_sparsity", "final_sparsity"}),
)

# What version 0.1.0 called some of the options, in trainer_state.json too.
OLD_NAMES = {
    "num_updates": "num_topology_updates",
    "update_every": "topology_update_every",
    "first_step": "topology_first_step",
    "last_step": "topology_last_step",
    "schedule": "pruning_schedule",
}


def option(help: str, default: Any = None, choices: Any = None) -> Any:
    """A field of [`TopologyOptions`]. Choices are the tables themselves: what is added to one can be chosen."""
    return field(default=default, metadata={"help": help} | ({"choices": choices} if choices is not None else {}))


@dataclass
class TopologyOptions:
    """
    When the topology is updated, and how; a field that is left `None` has the value of the method. The help beside
    each field is that of the command line: [`DynSparseTrainingArguments`] inherits them.
    """

    method: str = option(
        "Method of sparse training: a preset of the topology arguments below. Those given explicitly win.",
        default="dynsparse",
        choices=METHODS,
    )
    num_topology_updates: int | None = option(
        "Topology updates in the whole run, evenly spaced; 0 keeps the pattern fixed (static). Default: 80, or as "
        "many as leave 100 steps between them, for new blocks to grow; one in a run of less than 300. The paper's "
        "best at sparsity 0.9: 160 for single weights, 80 for 16x16 blocks."
    )
    topology_update_every: float | None = option(
        "Update every so many optimiser steps (below 1: a share of the run) instead of a number of times per run."
    )
    topology_first_step: float | None = option("No topology update before this step (below 1: this share of the run).")
    topology_last_step: float | None = option("No topology update after this step (below 1: this share of the run).")
    pruning_ratio: float = option(
        "Share of active blocks that the first update replaces. DynSparse: 0.5; 0.75 is better at sparsity 0.99."
    )
    pruning_schedule: str = option(
        "How the pruning ratio decays over the updates. DynSparse: cosine.", choices=SCHEDULES
    )
    prune_score: str = option(
        "Active blocks with the lowest score are pruned: a norm of their values (DynSparse: l1), the same with the "
        "newest spared (l1_patient), |w g| (weight_gradient), w² times AdamW's second moment (fisher: needs no dense "
        "gradient), |w g| over all steps since the last update (saliency: none either), what training has changed "
        "(movement), |w| + 0.01 |g| (mest), the dense gradient, or any (random).",
        choices=PRUNE_SCORES,
    )
    prune_min_age: int = option(
        "A new block survives so many topology updates before it is pruned, while there are others left to prune; 0 "
        "compares it with them at once."
    )
    regrow_rule: str = option(
        "Where new blocks grow: anywhere (random: DynSparse), where none was yet (unfired), where rows and columns "
        "are emptiest (balanced), at the largest dense gradient (gradient: RigL), the same freed of the scale of "
        "inputs (gradient_normalised) and of outputs (correlation), at the largest product of the scales of inputs "
        "and output gradients (rank_one: needs no dense gradient), drawn in proportion to it (rank_one_random), or of "
        "four blocks three by gradient and one anywhere (gradient_random: MST).",
        choices=REGROW_RULES,
    )
    readmit: bool = option("A block pruned in an update may return in the same update (RigL's rule).")
    replace_step: bool = option("A topology update takes the place of an optimiser step (RigL's rule).")
    density_schedule: str = option(
        "How the density changes in topology updates: 'constant', 'cubic' (gradual pruning), or phases "
        "'0:1,0.3:0,0.8:1' of progress:share, where share 0 is the density of the model's configuration and 1 that of "
        "--initial_sparsity. Layers have the shapes of their density at any time."
    )
    initial_sparsity: float = option("Sparsity that the density schedule starts from; 0 is dense.")
    final_sparsity: float | None = option(
        "Sparsity that the density schedule leads to, from that of the model: a trained one is pruned step by step. "
        "Instead of --initial_sparsity."
    )
    density_begin: float = option("Share of the run before which the cubic schedule stays at the initial density.")
    density_end: float = option("Share of the run from which the cubic schedule stays at the final density.")
    shrink_counts: bool = option(
        "Blocks pruned for a smaller density count as replaced, instead of coming on top (MST)."
    )
    allocation: str = option(
        "Which layers have how many blocks: as each was built (layer), the highest prune scores of all layers "
        "(global: GraNet), or regrown by the mean gradient momentum of layers (momentum: SNFS).",
        choices=ALLOCATIONS,
    )
    hidden_copy: bool = option(
        "Remember pruned blocks: they return with their last values when active ones have shrunk below them (Prune "
        "Once for All). For schedules of the density without regrowth."
    )
    regrow_std: float = option(
        "Standard deviation of the values of new blocks, for example a tenth of the model's `initializer_range`; 0 "
        "starts them at zero, so that an update changes no output.",
        default=0.0,
    )
    seed: int = option("Seed of topology updates: the same on every rank.", default=0)

    @property
    def given_options(self) -> set[str]:
        """Names of those that are not left to the method."""
        return {option.name for option in fields(TopologyOptions) if getattr(self, option.name) is not None}

    def topology_settings(self) -> "TopologySettings":
        """
        What these options amount to: those of the method, and what is given explicitly.

        Raises:
            ValueError: see [`TopologySettings`].
        """
        return TopologySettings(**{option.name: getattr(self, option.name) for option in fields(TopologyOptions)})


@dataclass
class TopologySettings(TopologyOptions):
    """
    The topology options of a run: every field that is not given, or `None`, has the value of the method. By default
    this is DynSparse (arXiv:2108.06277, section 3). Without `num_topology_updates` and `topology_update_every`,
    `for_run` has a default.

    Raises:
        ValueError: for an unknown method, score, rule, schedule or allocation, a number out of range, or options that
            exclude each other.

    Example:
        ```python
        >>> settings = TopologySettings(method="set", pruning_ratio=0.5)
        >>> settings.pruning_ratio, settings.pruning_schedule, settings.readmit
        (0.5, 'constant', False)
        ```
    """

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"`method` must be one of {', '.join(METHODS)}. Got {self.method!r}. {OWN_NAMES}")
        given = self.given_options
        ruled_out = frozenset[str]().union(*(pair for pair in _EITHER if pair & given))
        preset = {name: value for name, value in METHODS[self.method].settings.items() if name not in ruled_out}
        for name, value in {**DYNSPARSE, **preset}.items():
            if name not in given:
                setattr(self, name, value)
        self._check()

    def _check(self) -> None:
        resolve_score(self.prune_score, "prune_score", PRUNE_SCORES)
        resolve_score(self.regrow_rule, "regrow_rule", REGROW_RULES)
        check_regrow_std(self.regrow_std)
        if self.prune_min_age < 0:
            raise ValueError(f"`prune_min_age` must not be negative. Got {self.prune_min_age}. 0 spares no block.")
        pruning_ratio_at(0, 1, self.pruning_ratio, self.pruning_schedule)
        self.density_share(0.0)
        check_sparsity(self.initial_sparsity)
        if self.allocation not in ALLOCATIONS:
            raise ValueError(f"`allocation` must be one of {', '.join(ALLOCATIONS)}. Got {self.allocation!r}.")
        if self.final_sparsity is not None:
            self._check_final_sparsity()
        if self.hidden_copy:
            self._check_hidden_copy()

    def _check_final_sparsity(self) -> None:
        check_sparsity(self.final_sparsity or 0.0)
        if self.density_schedule == "constant":
            raise ValueError(
                f"`final_sparsity` is where a density schedule leads. Got {self.final_sparsity} with "
                "density_schedule='constant'. Choose 'cubic', or a method that has one: gmp or prune_ofa."
            )
        if self.initial_sparsity:
            raise ValueError(
                "A run with `final_sparsity` begins with the model as it is. Got final_sparsity="
                f"{self.final_sparsity} and initial_sparsity={self.initial_sparsity}. Leave one of them out."
            )

    def _check_hidden_copy(self) -> None:
        """It tells which blocks of a layer are active, and nothing else may."""
        if SCORES[self.prune_score].needs != {"values"}:
            fitting = ", ".join(name for name in PRUNE_SCORES if SCORES[name].needs == {"values"})
            raise ValueError(
                f"`hidden_copy` compares values of active and of pruned blocks. Got prune_score={self.prune_score!r}, "
                f"which looks at something else. Choose {fitting}."
            )
        otherwise = self.pruning_ratio or self.allocation != "layer" or self.prune_min_age
        if self.density_schedule == "constant" or otherwise:
            raise ValueError(
                "`hidden_copy` brings back what a schedule of the density has pruned in a layer, and nothing regrows "
                f"beside it. Got density_schedule={self.density_schedule!r}, pruning_ratio={self.pruning_ratio}, "
                f"allocation={self.allocation!r} and prune_min_age={self.prune_min_age}. Use it with 'cubic', 0, "
                "'layer' and 0, as method prune_ofa does."
            )

    @property
    def say_when(self) -> bool:
        """Whether there is a number of updates, or an interval."""
        return self.num_topology_updates is not None or self.topology_update_every is not None

    def for_run(self, total_steps: int) -> "TopologySettings":
        """These settings with `default_num_updates` if they do not say when; 5 steps apart if nothing is regrown."""
        if self.say_when:
            return self
        interval = STEPS_TO_LIVE if self.pruning_ratio else 5
        updates = default_num_updates(total_steps, self.topology_first_step, self.topology_last_step, interval)
        return replace(self, num_topology_updates=updates)

    @property
    def needs(self) -> frozenset[str]:
        """The statistics and records that updates need; see [`Score`] and [`Method`]."""
        rules = SCORES[self.prune_score], SCORES[self.regrow_rule], ALLOCATIONS[self.allocation], METHODS[self.method]
        needs = frozenset[str]().union(*(rule.needs for rule in rules))
        return needs | {"hidden_copy"} if self.hidden_copy else needs

    @property
    def observes_updates(self) -> bool:
        """Whether updates need the dense gradient, or what it is made of, of the step before."""
        return not self.needs.isdisjoint(OBSERVED - RECORDS.keys())

    @property
    def observes_every_step(self) -> bool:
        """Whether updates need the dense gradients of all steps, not only those of the step before."""
        return any(RECORDS[name].after_step is not None for name in self.needs & RECORDS.keys())

    @property
    def observes_active_blocks(self) -> bool:
        """Whether updates need the gradient of the active blocks at every step."""
        return any(RECORDS[name].before_step is not None for name in self.needs & RECORDS.keys())

    @property
    def changes_sizes(self) -> bool:
        """Whether updates change the numbers of active blocks of layers."""
        return self.density_schedule != "constant" or self.shares_out

    @property
    def shares_out(self) -> bool:
        """Whether the density schedule says how many blocks the model has, and something else how many a layer."""
        return self.allocation != "layer" or METHODS[self.method].targets is not None

    @property
    def shrinking_replaces(self) -> bool:
        """Whether blocks that a layer loses to become smaller count as replaced, instead of coming on top."""
        return self.shrink_counts or ALLOCATIONS[self.allocation].shrink_counts

    def plan(self, total_steps: int) -> tuple[PlannedUpdate, ...]:
        """
        The updates of a run of `total_steps` optimiser steps.

        Raises:
            ValueError: see `update_steps`.
        """
        when = (self.topology_update_every, self.topology_first_step, self.topology_last_step)
        steps = update_steps(total_steps, self.num_topology_updates, *when)
        return tuple(
            PlannedUpdate(
                step,
                pruning_ratio_at(number, len(steps), self.pruning_ratio, self.pruning_schedule),
                self.density_share(1.0 if number == len(steps) - 1 else step / total_steps),
            )
            for number, step in enumerate(steps)
        )

    def without_updates(self) -> "TopologySettings":
        """The same for a run whose topology stays as it is."""
        return TopologySettings(
            method="static", prune_score=self.prune_score, regrow_rule=self.regrow_rule, seed=self.seed
        )

    def density_share(self, progress: float) -> float:
        """Where the density stands at a share of the run: 1 is the initial one, 0 the final one."""
        return density_share(progress, self.density_schedule, self.density_begin, self.density_end)


def as_settings(settings: TopologySettings | None, options: Mapping[str, Any]) -> TopologySettings:
    """
    `settings`, by default those of DynSparse, with `options` in their place.

    Raises:
        TypeError: for settings of another type, or an option that does not exist.
        ValueError: see [`TopologySettings`].
    """
    if settings is None:
        return TopologySettings(**options)
    if not isinstance(settings, TopologySettings):
        raise TypeError(
            f"`settings` must be `TopologySettings`. Got {settings!r}. Give a number of updates by its name, "
            "`num_topology_updates=`."
        )
    return replace(settings, **options)
