"""What a run does with the topology: the settings that `TopologyUpdater`, `TopologyCallback` and methods share."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from ..blocks.sizes import check_sparsity
from .allocation import ALLOCATIONS
from .schedules import STEPS_TO_LIVE, PlannedUpdate, default_num_updates, density_share, pruning_ratio_at, update_steps
from .scores import PRUNE_SCORES, REGROW_RULES, SCORES, check_regrow_std, resolve_score


# Two ways to say when, and where the density begins or ends: who gives one does not want the preset's other.
_EITHER = (frozenset({"num_updates", "update_every"}), frozenset({"initial_sparsity", "final_sparsity"}))


@dataclass(frozen=True)
class TopologySettings:
    """
    When the topology is updated, and how. The defaults are DynSparse (arXiv:2108.06277, section 3).

    Args:
        num_updates (`int`, *optional*), update_every (`float`, *optional*): one of them; see `update_steps`. With
            neither, `for_run` has a default.
        first_step, last_step (`float`, *optional*): no update before or after; see `update_steps`.
        pruning_ratio (`float`): share of active blocks that the first update replaces.
        prune_score, regrow_rule (`str`): see `SCORES`.
        schedule (`str`): how the pruning ratio decays; see `SCHEDULES`.
        readmit (`bool`): whether a block pruned in an update may return in the same one (RigL).
        replace_step (`bool`): whether an update takes the place of the optimiser step before it (RigL). The loop does
            this: no parameter may move in a step that `TopologyUpdater.replaces_step` names.
        density_schedule (`str`): how the density goes from the initial to the final one; see `density_share`.
        initial_sparsity (`float`): that of the beginning, with a density schedule; the model has the one of the end.
        final_sparsity (`float`, *optional*): that of the end, with a density schedule; the model has the one of the
            beginning, such as all blocks of a trained dense model.
        density_begin, density_end (`float`): shares of the run between which a named density schedule acts. The last
            update has the final density in any case.
        shrink_counts (`bool`): whether blocks that a smaller density costs count as replaced (MST).
        allocation (`str`): which layers have how many blocks: "layer": as scheduled for each; "global": those of the
            highest prune scores of all layers stay (GraNet); "momentum": what is regrown is shared out by the mean
            gradient momentum of the layers (SNFS).
        hidden_copy (`bool`): whether pruned blocks are remembered, and return with their last values when the active
            ones have shrunk below them (Prune Once for All); see `choose_by_hidden_copy`.
        regrow_std (`float`): standard deviation of the values of new blocks; 0 makes them zero.
        seed (`int`): the same on every rank.

    Raises:
        ValueError: for an unknown score, rule, schedule or allocation, a number out of range, or settings that
            exclude each other.
    """

    num_updates: int | None = None
    update_every: float | None = None
    first_step: float | None = None
    last_step: float | None = None
    pruning_ratio: float = 0.5
    prune_score: str = "l1"
    regrow_rule: str = "random"
    schedule: str = "cosine"
    readmit: bool = False
    replace_step: bool = False
    density_schedule: str = "constant"
    initial_sparsity: float = 0.0
    final_sparsity: float | None = None
    density_begin: float = 0.0
    density_end: float = 1.0
    shrink_counts: bool = False
    allocation: str = "layer"
    hidden_copy: bool = False
    regrow_std: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        resolve_score(self.prune_score, "prune_score", PRUNE_SCORES)
        resolve_score(self.regrow_rule, "regrow_rule", REGROW_RULES)
        check_regrow_std(self.regrow_std)
        pruning_ratio_at(0, 1, self.pruning_ratio, self.schedule)
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
        if self.density_schedule == "constant" or self.pruning_ratio or self.allocation != "layer":
            raise ValueError(
                "`hidden_copy` brings back what a schedule of the density has pruned in a layer, and nothing regrows "
                f"beside it. Got density_schedule={self.density_schedule!r}, pruning_ratio={self.pruning_ratio} and "
                f"allocation={self.allocation!r}. Use it with 'cubic', 0 and 'layer', as method prune_ofa does."
            )

    def for_run(self, total_steps: int) -> "TopologySettings":
        """These settings with `default_num_updates` if they do not say when; 5 steps apart if nothing is regrown."""
        if self.num_updates is not None or self.update_every is not None:
            return self
        interval = STEPS_TO_LIVE if self.pruning_ratio else 5
        updates = default_num_updates(total_steps, self.first_step, self.last_step, interval)
        return replace(self, num_updates=updates)

    @property
    def needs(self) -> frozenset[str]:
        """The statistics that updates need; see [`Score`]."""
        of_scores = SCORES[self.prune_score].needs | SCORES[self.regrow_rule].needs
        momentum = {"momentum"} if self.allocation == "momentum" else set[str]()
        return of_scores | momentum | ({"hidden_copy"} if self.hidden_copy else set())

    @property
    def changes_sizes(self) -> bool:
        """Whether updates change the numbers of active blocks of layers."""
        return self.density_schedule != "constant" or self.allocation != "layer"

    def plan(self, total_steps: int) -> tuple[PlannedUpdate, ...]:
        """
        The updates of a run of `total_steps` optimiser steps.

        Raises:
            ValueError: see `update_steps`.
        """
        when = (self.update_every, self.first_step, self.last_step)
        steps = update_steps(total_steps, self.num_updates, *when)
        return tuple(
            PlannedUpdate(
                step,
                pruning_ratio_at(number, len(steps), self.pruning_ratio, self.schedule),
                self.density_share(1.0 if number == len(steps) - 1 else step / total_steps),
            )
            for number, step in enumerate(steps)
        )

    def without_updates(self) -> "TopologySettings":
        """The same for a run whose topology stays as it is."""
        constant = replace(self, hidden_copy=False, final_sparsity=None, density_schedule="constant")
        return replace(constant, allocation="layer", num_updates=0, update_every=None, first_step=None, last_step=None)

    def density_share(self, progress: float) -> float:
        """Where the density stands at a share of the run: 1 is the initial one, 0 the final one."""
        return density_share(progress, self.density_schedule, self.density_begin, self.density_end)


@dataclass(frozen=True)
class Method:
    """
    A method of sparse training.

    Args:
        source (`str`): where it was published.
        settings (`Mapping[str, Any]`): fields of `TopologySettings` that differ from those of DynSparse.
    """

    source: str
    settings: Mapping[str, Any]


# The paper's method, by which every setting has a value; the last two are the same for all methods.
DYNSPARSE: dict[str, Any] = {
    field.name: field.default for field in fields(TopologySettings) if field.name not in ("regrow_std", "seed")
}


METHODS: dict[str, Method] = {
    # Random blocks, kept for the whole run.
    "static": Method("arXiv:2108.06277, section 4", {"num_updates": 0}),
    # The default.
    "dynsparse": Method("arXiv:2108.06277, section 3", {}),
    # One ratio for the whole run.
    "set": Method("arXiv:1707.04780", {"pruning_ratio": 0.3, "schedule": "constant"}),
    # An update takes the place of the optimiser step, and what was just pruned may return.
    "rigl": Method(
        "arXiv:1911.11134",
        {
            "pruning_ratio": 0.3,
            "regrow_rule": "gradient",
            "readmit": True,
            "replace_step": True,
            "last_step": 0.75,
        },
    ),
    # DynSparse that regrows at the largest dense gradient of a block.
    "rigl-block": Method("arXiv:2108.06277, section 4", {"regrow_rule": "gradient"}),
    # Fewer updates with longer training between them.
    "itop": Method("arXiv:2102.02887", {"update_every": 0.05}),
    # Positions that were never active first.
    "unfired": Method("arXiv:2102.02887", {"regrow_rule": "unfired"}),
    # The first ratio is 0.05 of all positions at sparsity 0.9.
    "mest": Method("arXiv:2110.14032", {"prune_score": "mest", "schedule": "step"}),
    # Regrowth at the largest mean gradient, shared out between layers by it. Needs the dense gradient at every step.
    "snfs": Method("arXiv:1907.04840", {"regrow_rule": "momentum", "allocation": "momentum"}),
    # From dense to sparse, nothing regrows. Half of the run is left to train what remains.
    "gmp": Method("arXiv:1710.01878", {"pruning_ratio": 0.0, "density_schedule": "cubic", "density_end": 0.5}),
    # The same, with what was pruned remembered: it may return while the density falls, and for a while after.
    "prune_ofa": Method(
        "arXiv:2111.05754",
        {
            "update_every": 0.01,
            "last_step": 0.8,
            "pruning_ratio": 0.0,
            "density_schedule": "cubic",
            "density_end": 0.5,
            "hidden_copy": True,
        },
    ),
    # GMP by the magnitudes of all layers, beside RigL's exchange in each.
    "granet": Method(
        "arXiv:2106.10404",
        {
            "regrow_rule": "gradient",
            "readmit": True,
            "density_schedule": "cubic",
            "initial_sparsity": 0.5,
            "density_end": 0.7,
            "allocation": "global",
        },
    ),
    # Dense and sparse by turns, of 100 epochs: sparse from 10 to 15, ..., 70 to 75, and from 85.
    "ac_dc": Method(
        "arXiv:2106.12379",
        {
            "update_every": 0.01,
            "pruning_ratio": 0.0,
            "density_schedule": (
                "0:1,0.1:0,0.15:1,0.2:0,0.25:1,0.3:0,0.35:1,0.4:0,0.45:1,0.5:0,0.55:1,0.6:0,0.65:1,0.7:0,0.75:1,0.85:0"
            ),
            "allocation": "global",
        },
    ),
    # Down by steps, sparse, dense again at the end.
    "mst": Method(
        "arXiv:2408.11746",
        {
            "update_every": 0.01,
            "pruning_ratio": 0.3,
            "regrow_rule": "gradient_random",
            "density_schedule": "0:1,0.05:0.6,0.1:0.3,0.15:0,0.75:0.3,0.8:0.6,0.85:1",
            "shrink_counts": True,
        },
    ),
}


def method_settings(method: str, given: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """
    All settings of a method. What is `given`, and not `None`, wins over the preset.

    Raises:
        ValueError: for an unknown method.

    Example:
        ```python
        >>> settings = method_settings("set", {"pruning_ratio": 0.5, "readmit": None})
        >>> settings["pruning_ratio"], settings["schedule"], settings["readmit"]
        (0.5, 'constant', False)
        ```
    """
    if method not in METHODS:
        raise ValueError(f"`method` must be one of {', '.join(METHODS)}. Got {method!r}.")
    explicit = {name: value for name, value in (given or {}).items() if value is not None}
    ruled_out = frozenset().union(*(pair for pair in _EITHER if pair & explicit.keys()))
    preset = {name: value for name, value in METHODS[method].settings.items() if name not in ruled_out}
    return {**DYNSPARSE, **preset, **explicit}
