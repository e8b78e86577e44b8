"""The choice among backends: by request, by rule, by timing; and what a run keeps of it."""

import json
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import make_layer

from hf_dynsparse import configure_kernels, topology_summary, use_backend
from hf_dynsparse.ops import BACKENDS, Backend, Problem, choice, choose_backend, reference, tuning


PROBLEM = Problem.make(torch.device("cpu"), torch.float32, (4, 8), (8, 16), 2, 100, False)


def backend(name: str, reason: str | None = None, break_even: float = 1.0) -> Backend:
    """A backend that serves unless it has a reason."""
    return Backend(
        name,
        f"the {name} one",
        lambda *_: reason,
        reference.dds,
        reference.sdd,
        lambda device, block_shape: break_even,
    )


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three backends, of which the first does not serve."""
    monkeypatch.setattr(choice, "BACKENDS", (backend("fast", "needs B >= 16"), backend("plain"), backend("slow")))


@pytest.fixture
def seconds(table: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[dict[str, float]]:
    """What each backend takes, and an empty disk; `timed` counts how often it was asked."""
    times = {"plain": 2.0, "slow": 1.0, "timed": 0}

    def time_backends(problem: Problem, backends: list[Backend]) -> dict[str, float]:
        times["timed"] += 1
        return {entry.name: times[entry.name] for entry in backends}

    monkeypatch.setattr(tuning, "time_backends", time_backends)
    monkeypatch.setattr(tuning, "cache_file", lambda: tmp_path / "cache" / "kernels.json")
    configure_kernels(tuning="once")
    return times


def test_names_are_unique_and_the_reference_comes_last() -> None:
    names = [entry.name for entry in BACKENDS]
    assert len(set(names)) == len(names)
    assert names[-1] == "reference"


def test_a_problem_rounds_its_tokens() -> None:
    tokens = [
        Problem.make(torch.device("cpu"), torch.float32, (1, 1), (8, 8), 1, count, False).tokens
        for count in (0, 1, 2, 3, 100, 128, 4096)
    ]
    assert tokens == [1, 1, 2, 4, 128, 128, 4096]
    assert PROBLEM.density == 2 * 32 / 128


def test_the_first_that_serves_is_chosen_unless_another_is_asked_for(table: None) -> None:
    assert choose_backend(PROBLEM).name == "plain"
    with use_backend("slow"):
        assert choose_backend(PROBLEM).name == "slow"
        with use_backend("plain"):
            assert choose_backend(PROBLEM).name == "plain"
        assert choose_backend(PROBLEM).name == "slow"
    assert choose_backend(PROBLEM).name == "plain"


def test_the_rule_passes_over_a_backend_above_its_break_even(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "BACKENDS", (backend("sparse", break_even=0.4), backend("dense")))
    assert choose_backend(PROBLEM).name == "dense"
    assert choose_backend(replace(PROBLEM, nnzb=1)).name == "sparse"


def test_the_override_ends_with_an_exception(table: None) -> None:
    with pytest.raises(KeyError), use_backend("slow"):
        raise KeyError
    assert choose_backend(PROBLEM).name == "plain"


def test_a_backend_that_was_asked_for_and_does_not_serve_says_why(table: None) -> None:
    message = r"No backend serves 4 x 8 blocks of torch.float32 on cpu: fast: needs B >= 16$"
    with use_backend("fast"), pytest.raises(ValueError, match=message):
        choose_backend(PROBLEM)


def test_every_reason_is_given_when_none_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "BACKENDS", (backend("fast", "needs B >= 16"), backend("gpu", "needs CUDA")))
    with pytest.raises(ValueError, match="fast: needs B >= 16; gpu: needs CUDA"):
        choose_backend(PROBLEM)


def test_an_unknown_name_is_an_error(table: None) -> None:
    with (
        pytest.raises(ValueError, match="`use_backend` takes one of fast, plain, slow. Got 'cuda'."),
        use_backend("cuda"),
    ):
        pass
    with pytest.raises(ValueError, match="`tuning` must be one of off, once, force. Got 'on'."):
        configure_kernels(tuning="on")


def test_the_fastest_is_chosen_once_and_remembered_on_disk(
    seconds: dict[str, float], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="hf_dynsparse"):
        for _ in range(3):
            assert choose_backend(PROBLEM).name == "slow"
    assert seconds["timed"] == 1
    (message,) = caplog.messages
    assert message.startswith("forward 8x16 nnzb=2 of 4x8 float32 tokens=128 cpu ")
    assert message.endswith("slow (timed: plain 2e+03 ms, slow 1e+03 ms).")
    seconds["plain"] = 0.5
    configure_kernels(tuning="once")  # another process
    assert choose_backend(PROBLEM).name == "slow"
    assert seconds["timed"] == 1
    assert choose_backend(replace(PROBLEM, backward=True)).name == "plain"
    configure_kernels(tuning="force")
    assert choose_backend(PROBLEM).name == "plain"
    assert json.loads(tuning.cache_file().read_text())[str(PROBLEM)] == {"plain": 0.5, "slow": 1.0}


@pytest.mark.parametrize("content", ["{", "[1]", '{"x": 1}', ""])
def test_a_damaged_file_of_timings_is_measured_again(seconds: dict[str, float], content: str) -> None:
    tuning.cache_file().parent.mkdir()
    tuning.cache_file().write_text(content)
    assert choose_backend(PROBLEM).name == "slow"
    assert seconds["timed"] == 1
    assert str(PROBLEM) in json.loads(tuning.cache_file().read_text())


def test_a_disk_that_cannot_be_written_is_no_error(
    seconds: dict[str, float], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(tuning, "cache_file", lambda: tmp_path / "file" / "kernels.json")
    assert choose_backend(PROBLEM).name == "slow"
    assert "cannot be kept" in caplog.text


def test_choices_that_are_kept_are_used_and_no_others_timed(seconds: dict[str, float]) -> None:
    choose_backend(PROBLEM)
    kept = [choice.choice_to_json(*item) for item in choice.choices_made().items()]
    kept = json.loads(json.dumps(kept))
    seconds["slow"] = 3.0
    configure_kernels(tuning="force")
    choice.keep_choices(dict(map(choice.choice_from_json, kept)))
    assert choose_backend(PROBLEM).name == "slow"
    assert choose_backend(replace(PROBLEM, tokens=4096)).name == "slow"  # as for the nearest number of tokens
    assert choose_backend(replace(PROBLEM, backward=True)).name == "plain"  # nothing like it: by rule
    assert seconds["timed"] == 1
    choice.allow_new_choices()
    assert choose_backend(replace(PROBLEM, tokens=1)).name == "plain"
    assert seconds["timed"] == 2


def test_the_workspace_can_be_forbidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "BACKENDS", (backend("workspace"), backend("tiled")))
    assert choose_backend(PROBLEM).name == "workspace"
    configure_kernels(dense_workspace=False)
    assert choose_backend(PROBLEM).name == "tiled"


def test_real_backends_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    served = [entry for entry in BACKENDS if entry.why_not(PROBLEM.device, torch.float32, (16, 16)) is None]
    for backward in (False, True):
        problem = Problem.make(PROBLEM.device, torch.float32, (16, 16), (64, 64), 4, 100, backward)
        with torch.inference_mode():
            seconds = tuning.time_backends(problem, served)
        assert list(seconds) == [entry.name for entry in served]
        assert all(time > 0 for time in seconds.values())


def test_the_summary_shows_what_was_chosen_and_why(seconds: dict[str, float]) -> None:
    layer = make_layer((3, 5), 4, 6)
    (row,) = topology_summary(layer).layers
    assert (row.backend, row.why) == ("plain", "not used yet; by rule: density 0.4 is at most 1")
    layer(torch.zeros(3, 20)).sum().backward()
    (row,) = topology_summary(layer).layers
    assert row.backend == "slow"
    assert row.why.startswith("forward timed: plain 2e+03 ms, slow 1e+03 ms; backward timed: ")
    assert f"12x20 nnzb=6 by slow: {row.why}" in str(topology_summary(layer))
    with use_backend("plain"):
        (row,) = topology_summary(layer).layers
    assert (row.backend, row.why) == ("plain", "asked for with `use_backend`")


def test_the_kernels_of_the_device_that_do_not_serve_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    fast = replace(backend("fast", "is not built"), device="cpu")
    other = replace(backend("other", "runs elsewhere"), device="cuda")
    monkeypatch.setattr(choice, "BACKENDS", (fast, other, backend("plain")))
    (row,) = topology_summary(make_layer((3, 5), 4, 6)).layers
    assert row.why == "not used yet; by rule: density 0.4 is at most 1; not fast: is not built"
    configure_kernels(tuning="once")
    choose_backend(PROBLEM)
    assert set(choice.choices_made().values()) == {
        choice.Choice("plain", "no other can serve; not fast: is not built")
    }
