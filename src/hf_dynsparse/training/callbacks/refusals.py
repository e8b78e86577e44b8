"""Ways to train in parallel that sparse layers cannot take part in."""

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from transformers import TrainingArguments


# Not tested, or known to keep no tensor in which a block could be found.
REFUSED = {
    DistributedType.DEEPSPEED: "DeepSpeed, which flattens parameters and moments",
    DistributedType.FSDP: "FSDP1, which flattens parameters",
}


def check_parallelism(args: TrainingArguments) -> None:
    """
    Refuse what keeps parameters or moments in a form of its own, and what accelerate would silently leave out.

    Raises:
        ValueError: for DeepSpeed, FSDP1, FSDP on CPUs, and see `check_together`.
    """
    state = AcceleratorState()
    if state.distributed_type == DistributedType.FSDP and state.is_fsdp2:
        return
    received = REFUSED.get(state.distributed_type)
    if received is None and args.fsdp:
        received = "FSDP on CPUs, which accelerate leaves out"
    if received is not None:
        raise ValueError(
            "Sparse layers train in one process, by DDP (`distributed_type: MULTI_GPU`), or by FSDP2 on accelerators "
            f"(`distributed_type: FSDP`, `fsdp_version: 2`). Got {received}. Launch with one of the files in "
            "examples/accelerate."
        )
    check_together(state.num_processes)


def check_together(processes: int) -> None:
    """
    Raises:
        ValueError: if more were launched together than the `processes` that know of each other.
    """
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() != processes:
        raise ValueError(
            f"Processes that were launched together must train together. Got {torch.distributed.get_world_size()} of "
            "them, and each would train alone, for accelerate looks for GPUs and finds none. Add `--use_cpu` "
            "(`TrainingArguments(use_cpu=True)`)."
        )


def check_resizing(is_known: bool, loads_best: bool) -> None:
    """
    Refuse a density that changes where parameters cannot change their sizes.

    Args:
        is_known (`bool`): whether the trainer knows of it, and makes its reducer anew.
        loads_best (`bool`): whether it loads another checkpoint in the end.

    Raises:
        ValueError: for FSDP2, and for several processes, or a best model, under a trainer that does not know of it.
    """
    state = AcceleratorState()
    if state.distributed_type == DistributedType.FSDP:
        received = "FSDP2, which splits parameters between ranks"
    elif state.num_processes > 1 and not is_known:
        received = f"{state.num_processes} processes under a trainer that does not make its reducer anew"
    elif loads_best and not is_known:
        received = "`load_best_model_at_end` under a trainer that cannot load a model of another density"
    else:
        return
    raise ValueError(
        "A density that changes over time needs `DynSparseTrainer`, in one process or DDP; another trainer must be "
        f"one process that loads no checkpoint. Got {received}. Use that, or `density_schedule='constant'` with "
        "`allocation='layer'`."
    )
