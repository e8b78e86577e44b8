"""
A toy pre-training run on made-up text, for the tests that start, kill and compare processes.

Run by itself, under `accelerate launch`: `worker.py FOLDER RUNS.json`, where `RUNS.json` lists keyword
arguments of `train`. Every rank writes what became of each run to `FOLDER/<name>-<rank>.pt`, an exception too.
"""

import errno
import json
import math
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from transformers import BertTokenizer, Trainer, TrainerCallback, set_seed
from transformers.trainer_utils import get_last_checkpoint

from hf_dynsparse import (
    DynSparseBertConfig,
    DynSparseBertForMaskedLM,
    DynSparseTrainer,
    DynSparseTrainingArguments,
    TopologyCallback,
    sparse_layers,
)
from hf_dynsparse.data import DataCollatorForWholeWordMasking
from hf_dynsparse.nn.shards import local_rows, whole, whole_optimizer_state
from hf_dynsparse.ops import choice, tuning
from hf_dynsparse.topology import context
from hf_dynsparse.training import saving


SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
PIECES = [f"w{i}" for i in range(160)] + [f"##p{i}" for i in range(80)]


def train(
    folder: str,
    name: str,
    *,
    steps: int = 20,
    batch: int = 16,
    rows: int = 13 * 32,
    packed: bool = False,
    sparsity: float = 0.75,
    dropout: float = 0.0,
    dtype: str = "float32",
    sharded: bool = False,
    resume: bool | str = False,
    die: str | None = None,
    settings_of_rank: dict[str, Any] | None = None,
    other_draws: bool = False,
    topology_of_rank: int = 0,
    backend_of_rank: Sequence[str] = (),
    full_disk_at: int | None = None,
    nan_loss_at: int | None = None,
    wait_for: str | None = None,
    **arguments: Any,
) -> dict[str, Any]:
    """
    Train in `folder/name`; returns and writes everything that two equal runs have in common.

    Args:
        rows: of the data set; with whole batches only no rank has to repeat rows.
        packed: whether all rows have 32 tokens.
        sharded: by FSDP2 instead of DDP.
        resume: go on from the last checkpoint, if there is one; or from this one in `folder`.
        die: a moment of `MOMENTS` at which the process kills itself.
        settings_of_rank: of the topology, on all ranks but the first.
        other_draws: whether these ranks regrow other blocks than the seed says.
        topology_of_rank: added once a rank to the seed of the first topology.
        backend_of_rank: what each rank finds fastest when it times the backends.
        full_disk_at: the step at whose save the first rank cannot write.
        nan_loss_at: the step in which the second rank has a loss of NaN.
        wait_for: a file in `folder` without which the run does not leave its last step but one.
    """
    torch.set_num_threads(1)
    output_dir = os.path.join(folder, name)
    rank = int(os.environ.get("RANK", "0"))
    os.makedirs(output_dir, exist_ok=True)
    Path(output_dir, f"pid-{rank}").write_text(str(os.getpid()))
    os.environ.pop("ACCELERATE_USE_FSDP", None)  # left behind by a sharded run
    settings = {"num_topology_updates": 4, "logging_steps": 1, "save_strategy": "no", "learning_rate": 5e-3, "seed": 7}
    settings["kernel_tuning"] = "off"  # one choice in all processes that are compared
    args = DynSparseTrainingArguments(
        output_dir,
        max_steps=steps,
        per_device_train_batch_size=batch,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
        **{**settings, **({"fsdp": True} if sharded else {}), **arguments},
    )
    if sharded:
        shard_on_processors(args)
    if backend_of_rank:
        tuning.time_backends = lambda problem, backends: tuning.Timing(
            {backend.name: float(backend.name != backend_of_rank[rank]) for backend in backends}
        )
    callbacks = []
    if settings_of_rank and rank:
        callbacks = [TopologyCallback(args.topology_settings(), group_lasso=args.group_lasso, **settings_of_rank)]
    if die is not None:
        MOMENTS[die](die_after_calls=3)
    tokenizer = BertTokenizer(vocab={piece: i for i, piece in enumerate(SPECIAL + PIECES)}, model_max_length=32)
    trainer = DynSparseTrainer(
        toy_model(dropout, sparsity, topology_seed=topology_of_rank * rank).to(getattr(torch, dtype)),
        args,
        data_collator=CountingCollator(tokenizer, seed=args.seed),
        train_dataset=toy_rows(rows, (30,) if packed else (4, 9, 17, 30)),
        eval_dataset=toy_rows(19),  # the last batch of two ranks is filled up with repeated rows
        piece_counts=range(len(SPECIAL + PIECES)),
        callbacks=callbacks,
    )
    if full_disk_at is not None and rank == 0:
        fail_at(trainer, "_save_optimizer_and_scheduler", full_disk_at, OSError(errno.ENOSPC, "No space left"))
    if wait_for is not None:
        trainer.add_callback(WaitForFile(Path(folder, wait_for)))
    if nan_loss_at is not None and rank == 1:
        fail_at(trainer, "compute_loss", nan_loss_at - 1, math.nan)
    if isinstance(resume, str):
        checkpoint = os.path.join(folder, resume)
    else:
        checkpoint = get_last_checkpoint(output_dir) if resume else None
    others = {"draw_generator": lambda *what: torch.Generator().manual_seed(99)} if other_draws and rank else {}
    with patch.multiple(context, **others) if others else nullcontext():
        trainer.train(resume_from_checkpoint=checkpoint)
    result = describe(trainer)
    torch.save(result, os.path.join(folder, f"{name}-{rank}.pt"))
    return result


def train_or_tell(folder: str, name: str, result: str, **run: Any) -> None:
    """The same for one of two that want the same folder: what became of it goes to `FOLDER/<result>.pt`."""
    try:
        reached: Any = train(folder, name, **run)
    except OSError as error:
        reached = {"error": str(error)}
    torch.save({"pid": os.getpid(), **reached}, os.path.join(folder, f"{result}.pt"))


def describe(trainer: DynSparseTrainer) -> dict[str, Any]:
    """What a run reached: tensors and the log, nothing that depends on the clock."""
    layers, optimizer = sparse_layers(trainer.model), whole_optimizer_state(trainer.optimizer)["state"]
    clock = ("runtime", "per_second", "train_loss")  # `train_loss` is a mean over this process's steps only
    if trainer.args.world_size > 1:  # counted by the padding of this rank's rows
        clock += ("dynsparse/tokens",)
    return {
        "model": {name: whole(tensor).clone() for name, tensor in trainer.model.state_dict().items()},
        "index": {name: layer.block_index.clone() for name, layer in layers.items()},
        "ever_active": dict(trainer.topology.ever_active),
        "metrics": dict(trainer.topology.metrics),
        "moments": {f"{i}.{name}": moment for i, state in optimizer.items() for name, moment in state.items()},
        "log": [
            {key: value for key, value in entry.items() if not any(word in key for word in clock)}
            for entry in trainer.state.log_history
        ],
        "launch": {name: value for name, value in os.environ.items() if name.endswith(("RANK", "WORLD_SIZE"))},
        "local_blocks": {
            name: len(local_rows(layer.values)[0]) for name, layer in sparse_layers(trainer.model).items()
        },
        "best": trainer.state.best_model_checkpoint,
        "masked": trainer.data_collator.masked,
        "backends": {str(problem): chosen.backend for problem, chosen in choice.plan.choices.items()},
    }


def fail_at(trainer: DynSparseTrainer, name: str, step: int, failure: Exception | float) -> None:
    """Makes a method raise an error, or give so many times its result, after `step` steps."""
    method = getattr(trainer, name)

    def failing(*args: Any, **kwargs: Any) -> Any:
        if trainer.state.global_step != step:
            return method(*args, **kwargs)
        if isinstance(failure, Exception):
            raise failure
        return method(*args, **kwargs) * failure

    setattr(trainer, name, failing)


def shard_on_processors(args: DynSparseTrainingArguments) -> None:
    """accelerate shards on accelerators only, and would run DDP here: tell it that this is one."""
    assert args.device.type == "cpu"
    PartialState().distributed_type = DistributedType.MULTI_GPU


class CountingCollator(DataCollatorForWholeWordMasking):
    """Remembers the number of masked tokens of each batch."""

    masked: list[int]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.masked = []

    def __call__(self, examples: Any) -> dict[str, torch.Tensor]:
        batch = super().__call__(examples)
        self.masked.append(int((batch["labels"] != -100).sum()))
        return batch


class WaitForFile(TrainerCallback):
    """Keeps a run from ending before another process has said, by a file, what became of it."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        deadline = time.monotonic() + 240
        while state.global_step == state.max_steps - 1 and not self.file.exists():
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self.file} did not come.")
            time.sleep(0.001)


def toy_rows(count: int, lengths: Sequence[int] = (4, 9, 17, 30)) -> list[dict[str, list[int]]]:
    """Rows of very different lengths, so that two halves of a batch hold different numbers of masked tokens."""
    draw = random.Random(1)
    return [
        {"input_ids": [2, *(draw.randrange(5, 245) for _ in range(draw.choice(lengths))), 3]} for _ in range(count)
    ]


def toy_model(dropout: float, sparsity: float, topology_seed: int) -> DynSparseBertForMaskedLM:
    """The same weights every time; `topology_seed` changes the block indices alone."""
    set_seed(3)
    config = DynSparseBertConfig.preset(
        "tiny",
        sparsity=sparsity,
        block_size=8,
        vocab_size=len(SPECIAL + PIECES),
        hidden_size=32,
        intermediate_size=64,
        max_position_embeddings=32,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    model = DynSparseBertForMaskedLM(config)
    if topology_seed:
        for layer in sparse_layers(model).values():
            generator = torch.Generator().manual_seed(topology_seed)
            layer.block_index.copy_(torch.randperm(layer.num_blocks, generator=generator)[: layer.nnzb])
    return model


def kill_self_in(owner: Any, function: str, *, before: bool) -> Callable[..., None]:
    """Makes a function that arms `owner.function` to end this process in, or right after, its n-th call."""

    def arm(die_after_calls: int) -> None:
        original, calls = getattr(owner, function), 0

        def deadly(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == die_after_calls and before:
                os.kill(os.getpid(), signal.SIGKILL)
            returned = original(*args, **kwargs)
            if calls == die_after_calls:
                os.kill(os.getpid(), signal.SIGKILL)
            return returned

        setattr(owner, function, deadly)

    return arm


# Moments of a save, in order; each in the third save of the run.
MOMENTS: dict[str, Callable[..., None]] = {
    "before anything is written": kill_self_in(Trainer, "save_model", before=True),
    "after the model file": kill_self_in(Trainer, "save_model", before=False),
    "before the rename": kill_self_in(saving, "publish_checkpoint", before=True),
    "after the rename": kill_self_in(saving, "publish_checkpoint", before=False),
    "after old checkpoints are removed": kill_self_in(saving, "rotate_checkpoints", before=False),
}


def run_all(folder: str, runs: list[dict[str, Any]]) -> None:
    """Run every run of the list; an exception ends a run, is written down, and does not end the others."""
    for run in runs:
        try:
            train(folder, **run)
        except Exception as error:
            rank = os.environ.get("RANK", "0")
            torch.save({"error": f"{type(error).__name__}: {error}"}, os.path.join(folder, f"{run['name']}-{rank}.pt"))
    PartialState().destroy_process_group()  # its threads may abort a process that ends before them


def run_rank(folder: str, runs: list[dict[str, Any]], environment: dict[str, str]) -> None:
    """`run_all` in a process that was forked to be the rank that `environment` says."""
    os.environ.update(environment)
    with open(os.path.join(folder, "output.txt"), "ab") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    run_all(folder, runs)


if __name__ == "__main__":
    run_all(sys.argv[1], json.loads(Path(sys.argv[2]).read_text()))
