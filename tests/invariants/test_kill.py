"""
A run that is killed and resumed ends with the bits of one that never was.

`DYNSPARSE_KILLS=20 pytest tests/invariants/test_kill.py` kills a process twenty times instead of three, and one of two
ranks as often instead of once: two by DDP, two by FSDP2, and so on.
"""

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import worker
from launch import forking, two_ranks
from transformers.trainer_utils import get_last_checkpoint

from hf_dynsparse.checkpoints.saved_run import STAGING_FOLDER


KILLS = int(os.environ.get("DYNSPARSE_KILLS", "3"))
TWO_RANK_KILLS = int(os.environ.get("DYNSPARSE_KILLS", "1"))
STEPS = 12
RUN = {
    "steps": STEPS,
    "batch": 8,
    "dropout": 0.1,
    "save_strategy": "steps",
    "save_steps": 1,
    "save_total_limit": 2,
    "group_lasso": 0.1,
    "distance_bias": "1:0@0.7",
}
RULES = ("random", "gradient")


@pytest.fixture(scope="module")
def start() -> Callable[..., Any]:
    return starting(worker.train)


def starting(target: Callable[..., Any]) -> Callable[..., Any]:
    """Starts `target` in a process of its own, forked from one that has imported everything already."""

    def start_process(folder: Path, name: str, **run: Any) -> Any:
        process = forking().Process(target=target, args=(str(folder), name), kwargs={**RUN, **run})
        process.start()
        return process

    return start_process


@pytest.fixture(scope="module")
def uninterrupted(start: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What a run reaches that nobody disturbs, by regrow rule."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    reached = {}
    for rule in RULES:
        process = start(folder, rule, regrow_rule=rule)
        process.join()
        assert process.exitcode == 0
        reached[rule] = torch.load(folder / f"{rule}-0.pt")
        assert reached[rule]["metrics"]["topology_updates"] == 4
    return reached


def assert_same_bits(reached: dict[str, Any], expected: dict[str, Any]) -> None:
    for part in ("model", "index", "moments", "ever_active"):
        assert reached[part].keys() == expected[part].keys()
        for key, tensor in expected[part].items():
            assert torch.equal(reached[part][key], tensor), (part, key)
    assert reached["metrics"] == expected["metrics"]
    assert reached["log"] == expected["log"]


def wait_for_moment(folder: Path, draw: random.Random, alive: Callable[[], bool]) -> None:
    """Wait for a random moment of the run in `folder`: of a save at every second call, else of any step."""
    name, deadline = f"checkpoint-{draw.randrange(2, STEPS - 1)}", time.monotonic() + 240
    files = draw.choice((None, draw.randrange(1, 7)))  # a whole checkpoint has seven

    def come() -> bool:
        begun = files is not None and len(list((folder / STAGING_FOLDER / name).glob("*"))) >= files
        return begun or (folder / name).exists()

    while not come():
        assert alive(), "the run ended before it could be killed"
        assert time.monotonic() < deadline, "the run hangs"
        time.sleep(0.0005)
    time.sleep(0 if files else draw.uniform(0, 0.1))


def report_kill(folder: Path, kill: int) -> None:
    print(f"kill {kill}: step {last_step(folder)}, amid a save: {(folder / STAGING_FOLDER).exists()}")  # noqa: T201


def last_step(folder: Path) -> int:
    """Of the last checkpoint, 0 without any."""
    last = get_last_checkpoint(str(folder))
    return int(last.rpartition("-")[2]) if last else 0


@pytest.mark.parametrize("kill", range(KILLS))
def test_killed_at_random(
    start: Callable[..., Any], uninterrupted: dict[str, dict[str, Any]], tmp_path: Path, kill: int
) -> None:
    draw, rule = random.Random(kill), RULES[kill % 2]
    process = start(tmp_path, "run", regrow_rule=rule)
    wait_for_moment(tmp_path / "run", draw, process.is_alive)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    report_kill(tmp_path / "run", kill)

    resumed = start(tmp_path, "run", regrow_rule=rule, resume=True)
    resumed.join()
    assert resumed.exitcode == 0
    assert_same_bits(torch.load(tmp_path / "run-0.pt"), uninterrupted[rule])
    assert not (tmp_path / "run" / STAGING_FOLDER).exists()


@pytest.mark.parametrize("moment", worker.MOMENTS)
def test_killed_amid_a_save(
    start: Callable[..., Any], uninterrupted: dict[str, dict[str, Any]], tmp_path: Path, moment: str
) -> None:
    process = start(tmp_path, "run", regrow_rule="random", die=moment)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    complete = 3 if "after the rename" in moment or "removed" in moment else 2
    assert last_step(tmp_path / "run") == complete

    resumed = start(tmp_path, "run", regrow_rule="random", resume=True)
    resumed.join()
    assert resumed.exitcode == 0
    assert_same_bits(torch.load(tmp_path / "run-0.pt"), uninterrupted["random"])
    left = {path.name for path in (tmp_path / "run").iterdir() if path.is_dir()}
    assert left == {f"checkpoint-{STEPS - 1}", f"checkpoint-{STEPS}"}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the two ranks work: the first of them to be launched leave an uninterrupted run there."""
    return tmp_path_factory.mktemp("two_ranks")


@pytest.mark.slow
@pytest.mark.parametrize("kill", range(TWO_RANK_KILLS))
def test_one_of_two_ranks_is_killed(shared: Path, kill: int) -> None:
    draw, rank, sharded = random.Random(100 + kill), kill % 2, kill // 2 % 2 == 1
    # Long enough that a kill which comes late on a busy machine still comes before the end.
    run = {**RUN, "regrow_rule": "gradient", "steps": 2 * STEPS, "save_steps": 2, "sharded": sharded}
    name, undisturbed = f"killed-{kill}", f"uninterrupted-{sharded}"
    runs = [{**run, "name": name}]
    if not (shared / f"{undisturbed}-0.pt").exists():
        runs.insert(0, {**run, "name": undisturbed})
    with two_ranks(shared, runs) as launcher:
        wait_for_moment(shared / name, draw, lambda: launcher.poll() is None)
        os.kill(int((shared / name / f"pid-{rank}").read_text()), signal.SIGKILL)
        assert launcher.wait(timeout=120) != 0
    report_kill(shared / name, kill)
    with two_ranks(shared, [{**run, "name": name, "resume": True}]) as launcher:
        assert launcher.wait(timeout=240) == 0, (shared / "output.txt").read_text()[-4000:]
    for rank in range(2):
        expected = torch.load(shared / f"{undisturbed}-{rank}.pt")
        assert_same_bits(torch.load(shared / f"{name}-{rank}.pt"), expected)
