"""A reducer of DDP for parameters that have changed their sizes."""

from accelerate import DistributedDataParallelKwargs
from torch.nn.parallel import DistributedDataParallel


def rebuild_reducer_(model: DistributedDataParallel, handler: DistributedDataParallelKwargs | None) -> None:
    """
    Wrap the same model again as accelerate has done, for a reducer knows the sizes of parameters. In place: the loop
    of transformers holds the wrapper itself, and would go on calling the old one.
    """
    settings = {} if handler is None else handler.to_kwargs()
    # The old one goes first: as long as it lives, so do the nodes of the graph that add up gradients of the old sizes.
    del model.reducer, model.logger
    DistributedDataParallel.__init__(model, model.module, model.device_ids, model.output_device, **settings)
    if handler is not None:
        handler.register_comm_hook(model)
