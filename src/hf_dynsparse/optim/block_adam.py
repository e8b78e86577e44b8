"""`BlockAdamW`: AdamW in which every block has an age of its own, so that a new block starts as Adam starts."""

from collections.abc import Iterable
from itertools import chain
from typing import Any

import torch

from ..nn.shards import local_rows
from .second_moment import bias_correction


class BlockAdamW(torch.optim.AdamW):
    """
    AdamW that corrects the bias of moments by the age of each block instead of the age of the run.

    A topology update sets the moments of a new block to zero. After `a` steps they are too small by `1 - beta1**a` and
    `1 - beta2**a`, but `AdamW` divides by these terms for its own number of steps `t`, so the block's steps are
    `r(a) / r(t)` times as long as in a young run, `r(a) = (1 - beta1**a) / sqrt(1 - beta2**a)`: with the usual betas
    and large `t` 3.2 times at first, 6.6 times after twelve steps, still twice after 270. Here the factor is 1.

    A block that was never replaced takes the steps of `torch.optim.AdamW`, and so does every other parameter.

    Args:
        params (`Iterable`): parameter groups; those with `"per_block": True` hold `values` of sparse layers. See
            [`parameter_groups`].
        lr, betas, eps, weight_decay, foreach, fused: as in `torch.optim.AdamW`; the last two for the other groups.
        new_block_warmup (`int`): steps over which the learning rate of a new block rises: the step of age `a` (0, 1,
            ...) is `min(1, (a + 1) / (new_block_warmup + 1))` of its full length. The blocks of the first topology
            start with the run, which has a warm-up of its own.

    State of a group of blocks, beside that of `AdamW`:
        age (`torch.float32` of shape `(nnzb, 1, 1)`): steps since the block was activated. It goes to zero with the
            moments: `clear_moments_`.

    Raises:
        ValueError: for a negative warm-up, or what `AdamW` refuses.

    Example:
        ```python
        >>> optimizer = BlockAdamW(parameter_groups(model, weight_decay=0.01), lr=1e-3)
        >>> updater = TopologyUpdater(model, optimizer, total_steps=1000, num_topology_updates=80)
        ```
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        new_block_warmup: int = 0,
        foreach: bool | None = None,
        fused: bool | None = None,
    ) -> None:
        if new_block_warmup < 0:
            raise ValueError(f"`new_block_warmup` must not be negative. Got {new_block_warmup}. 0 turns it off.")
        super().__init__(params, lr, betas, eps, weight_decay, foreach=foreach, fused=fused)
        self.defaults["new_block_warmup"] = new_block_warmup
        # Else a gradient scaler (fp16) would leave unscaling, and infinite gradients, to the fused kernel alone.
        self._step_supports_amp_scaling = False

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch; which groups hold blocks is not the file's to say, and ages are not rounded to bfloat16."""
        per_block = [group.get("per_block", False) for group in self.param_groups]
        super().load_state_dict(state_dict)
        for group, own in zip(self.param_groups, per_block, strict=True):
            group["per_block"] = own
        saved, own_parameters = (
            chain.from_iterable(group["params"] for group in groups)
            for groups in (state_dict["param_groups"], self.param_groups)
        )
        for number, parameter in zip(saved, own_parameters, strict=True):
            age = state_dict["state"].get(number, {}).get("age")
            if age is not None:
                self.state[parameter]["age"] = age.to(parameter.device, torch.float32, copy=True)

    def _init_group(
        self,
        group: dict[str, Any],
        params: list[torch.Tensor],
        grads: list[torch.Tensor],
        *moments: list[torch.Tensor],
    ) -> bool:
        # What this leaves in the lists is stepped by torch.
        has_complex: bool = super()._init_group(group, params, grads, *moments)
        if group.get("per_block", False):
            for values, gradient in zip(params, grads, strict=True):
                _step_blocks(values, gradient, self.state[values], group, self.defaults["new_block_warmup"])
            for tensors in (params, grads, *moments):
                tensors.clear()
        return has_complex


def _step_blocks(
    values: torch.Tensor, gradient: torch.Tensor, state: dict[str, Any], group: dict[str, Any], warmup: int
) -> None:
    """One step of AdamW on all blocks of a layer (arXiv:1711.05101, algorithm 2), each with its own age."""
    if "age" not in state:  # the first step, or moments that `AdamW` has saved
        state["age"] = torch.full_like(values[:, :1, :1], float(state["step"]), dtype=torch.float32)
    step = state["step"].add_(1)
    weights, gradient, first, second, age = (
        local_rows(tensor)[0] for tensor in (values, gradient, state["exp_avg"], state["exp_avg_sq"], state["age"])
    )
    (beta1, beta2), rate = group["betas"], group["lr"]
    age.add_(1)
    if warmup:
        rate = rate * torch.where(age < step, age / (warmup + 1), 1.0).clamp_(max=1.0)
    first.lerp_(gradient, 1.0 - beta1)
    second.mul_(beta2).addcmul_(gradient, gradient, value=1.0 - beta2)
    length = (second / bias_correction(beta2, age)).sqrt_().add_(group["eps"])
    weights.mul_(1.0 - rate * group["weight_decay"])
    weights.addcdiv_(first * (rate / bias_correction(beta1, age)), length, value=-1.0)
