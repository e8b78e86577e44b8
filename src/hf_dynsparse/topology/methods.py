"""The methods of sparse training: values of the topology options, and the functions of one that decides otherwise."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .context import UpdateContext
    from .update import Replacement


@dataclass(frozen=True)
class Method:
    """
    A method of sparse training.

    Args:
        source (`str`): where it was published.
        settings (`Mapping[str, Any]`): topology options whose values differ from those of DynSparse.
        arguments (`Mapping[str, Any]`): defaults of `block_age_adam` and `new_block_warmup` in
            [`DynSparseTrainingArguments`]; a loop of your own makes its optimiser itself.
        targets (`Callable[[UpdateContext], dict[str, int]]`, *optional*): how many active blocks each layer has after
            an update. Default: as the option `allocation` says.
        choose (`Callable[[UpdateContext, str, int], Replacement]`, *optional*): which blocks of the layer of this name
            are pruned and regrown, to reach this number of active ones. Default: by `prune_score` and `regrow_rule`,
            or by `hidden_copy`.
        needs (`frozenset[str]`): statistics that these two functions look at, see [`Score`], and records, see
            `hf_dynsparse.topology.records`.
    """

    source: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    targets: "Callable[[UpdateContext], dict[str, int]] | None" = None
    choose: "Callable[[UpdateContext, str, int], Replacement] | None" = None
    needs: frozenset[str] = frozenset()
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @property
    def decides(self) -> tuple[Any, ...]:
        """What the settings do not tell: the functions of the method."""
        return self.targets, self.choose, self.needs


# The paper's method (arXiv:2108.06277, section 3), by which every option has a value.
DYNSPARSE: dict[str, Any] = {
    "pruning_ratio": 0.5,
    "pruning_schedule": "cosine",
    "prune_score": "l1",
    "prune_min_age": 0,
    "regrow_rule": "random",
    "readmit": False,
    "replace_step": False,
    "density_schedule": "constant",
    "initial_sparsity": 0.0,
    "density_begin": 0.0,
    "density_end": 1.0,
    "shrink_counts": False,
    "allocation": "layer",
    "hidden_copy": False,
}

METHODS: dict[str, Method] = {
    # Random blocks, kept for the whole run.
    "static": Method("arXiv:2108.06277, section 4", {"num_topology_updates": 0}),
    # The default.
    "dynsparse": Method("arXiv:2108.06277, section 3", DYNSPARSE),
    # One ratio for the whole run.
    "set": Method("arXiv:1707.04780", {"pruning_ratio": 0.3, "pruning_schedule": "constant"}),
    # An update takes the place of the optimiser step, and what was just pruned may return.
    "rigl": Method(
        "arXiv:1911.11134",
        {
            "pruning_ratio": 0.3,
            "regrow_rule": "gradient",
            "readmit": True,
            "replace_step": True,
            "topology_last_step": 0.75,
        },
    ),
    # DynSparse that regrows at the largest dense gradient of a block.
    "rigl-block": Method("arXiv:2108.06277, section 4", {"regrow_rule": "gradient"}),
    # Fewer updates with longer training between them.
    "itop": Method("arXiv:2102.02887", {"topology_update_every": 0.05}),
    # Positions that were never active first.
    "unfired": Method("arXiv:2102.02887", {"regrow_rule": "unfired"}),
    # The first ratio is 0.05 of all positions at sparsity 0.9.
    "mest": Method("arXiv:2110.14032", {"prune_score": "mest", "pruning_schedule": "step"}),
    # New blocks start as Adam starts. The authors have runs of 128 weights: block_size (1, 128).
    "smet": Method(
        "arXiv:2606.00888",
        {"topology_update_every": 100, "pruning_ratio": 0.2},
        arguments={"block_age_adam": True, "new_block_warmup": 100},
    ),
    # Regrowth at the largest mean gradient, shared out between layers by it. Needs the dense gradient at every step.
    "snfs": Method("arXiv:1907.04840", {"regrow_rule": "momentum", "allocation": "momentum"}),
    # From dense to sparse, nothing regrows. Half of the run is left to train what remains.
    "gmp": Method("arXiv:1710.01878", {"pruning_ratio": 0.0, "density_schedule": "cubic", "density_end": 0.5}),
    # The same, with what was pruned remembered: it may return while the density falls, and for a while after.
    "prune_ofa": Method(
        "arXiv:2111.05754",
        {
            "topology_update_every": 0.01,
            "topology_last_step": 0.8,
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
            "topology_update_every": 0.01,
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
            "topology_update_every": 0.01,
            "pruning_ratio": 0.3,
            "regrow_rule": "gradient_random",
            "density_schedule": "0:1,0.05:0.6,0.1:0.3,0.15:0,0.75:0.3,0.8:0.6,0.85:1",
            "shrink_counts": True,
        },
    ),
}
