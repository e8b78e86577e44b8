"""
Methods of sparse training as presets of one engine: a table of settings, each with its source.

A preset names only what differs from DynSparse. The distribution of the density over the layers is the model's
affair: SET, RigL and MEST were published with one such as `erk`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from .settings import TopologySettings


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

# Two ways to say when, and where the density begins or ends: who gives one does not want the preset's other.
_EITHER = (frozenset({"num_updates", "update_every"}), frozenset({"initial_sparsity", "final_sparsity"}))


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
