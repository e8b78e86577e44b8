"""The choice among backends: by request, by rule, by timing; and what a run keeps of it."""

import json
import logging
import math
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import FrameType

import pytest
import torch
from helpers import make_layer, needs_kernels

from hf_dynsparse import BlockSparseLinear, configure_kernels, register_backend, topology_summary, use_backend
from hf_dynsparse.ops import BACKENDS, Backend, Problem, backends, choice, choose_backend, native, reference, tuning
from hf_dynsparse.ops.tuning import cache_file  # before a fixture replaces it


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


def by_name(*backends: Backend) -> dict[str, Backend]:
    return {entry.name: entry for entry in backends}


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three backends, of which the first does not serve."""
    monkeypatch.setattr(
        choice, "BACKENDS", by_name(backend("fast", "needs B >= 16"), backend("plain"), backend("slow"))
    )


class Stopwatch:
    """What each backend takes, how the timing went, and how often the backends were timed."""

    def __init__(self) -> None:
        self.seconds = {"plain": 2.0, "slow": 1.0}
        self.steady = self.calm = True
        self.timed = 0

    def time(self, problem: Problem, backends: list[Backend]) -> tuning.Timing:
        self.timed += 1
        return tuning.Timing(self.glance(problem, backends), self.steady, self.calm)

    def glance(self, problem: Problem, backends: list[Backend]) -> dict[str, float]:
        return {entry.name: self.seconds[entry.name] for entry in backends}


@pytest.fixture
def stopwatch(table: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Stopwatch:
    """The times of the backends in the table, and an empty disk."""
    stopwatch = Stopwatch()
    monkeypatch.setattr(tuning, "time_backends", stopwatch.time)
    monkeypatch.setattr(tuning, "glance", stopwatch.glance)
    monkeypatch.setattr(tuning, "cache_file", lambda: tmp_path / "cache" / "kernels.json")
    configure_kernels(tuning="once")
    return stopwatch


def start_again(tuning: str = "once") -> None:
    """As another process would."""
    configure_kernels(tuning=tuning)


def test_names_are_unique_and_the_reference_comes_last() -> None:
    assert [entry.name for entry in BACKENDS.values()] == list(BACKENDS)
    assert list(BACKENDS)[-1] == "reference"


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
    monkeypatch.setattr(choice, "BACKENDS", by_name(backend("sparse", break_even=0.4), backend("dense")))
    assert choose_backend(PROBLEM).name == "dense"
    assert choose_backend(replace(PROBLEM, nnzb=1)).name == "sparse"


def test_a_backend_from_outside_is_a_candidate_and_its_name_its_own(
    stopwatch: Stopwatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "BACKENDS", choice.BACKENDS)
    register_backend(backend("mine"))
    with pytest.raises(ValueError, match="must have a name of its own. Got 'mine', which is taken by: the mine one."):
        register_backend(backend("mine"))
    stopwatch.seconds["mine"] = 0.1
    assert choose_backend(PROBLEM).name == "mine"
    configure_kernels(tuning="off")
    assert choose_backend(PROBLEM).name == "plain"  # by rule, those of the package go first
    with use_backend("mine"):
        assert choose_backend(PROBLEM).name == "mine"


def test_the_override_ends_with_an_exception(table: None) -> None:
    with pytest.raises(KeyError), use_backend("slow"):
        raise KeyError
    assert choose_backend(PROBLEM).name == "plain"


def test_a_backend_that_was_asked_for_and_does_not_serve_says_why(table: None) -> None:
    message = r"No backend serves 4 x 8 blocks of torch.float32 on cpu: fast: needs B >= 16$"
    with use_backend("fast"), pytest.raises(ValueError, match=message):
        choose_backend(PROBLEM)


def test_every_reason_is_given_when_none_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "BACKENDS", by_name(backend("fast", "needs B >= 16"), backend("gpu", "needs CUDA")))
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
    stopwatch: Stopwatch, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG, logger="hf_dynsparse"):
        for _ in range(3):
            assert choose_backend(PROBLEM).name == "slow"
    assert stopwatch.timed == 1
    (message,) = caplog.messages
    assert message.startswith("forward 8x16 nnzb=2 of 4x8 float32 tokens=128 cpu ")
    assert message.endswith("slow (timed: plain 2e+03 ms, slow 1e+03 ms).")
    stopwatch.seconds["plain"] = 0.6  # not so far off that a glance would notice
    start_again()
    assert choose_backend(PROBLEM).name == "slow"
    assert stopwatch.timed == 1
    assert choose_backend(replace(PROBLEM, backward=True)).name == "plain"
    start_again("force")
    assert choose_backend(PROBLEM).name == "plain"
    kept = json.loads(tuning.cache_file().read_text())[f"{PROBLEM} by plain, slow"]
    assert kept["seconds"] == {"plain": 0.6, "slow": 1.0}
    assert time.time() - kept["when"] < 60


def test_a_timing_that_a_glance_contradicts_is_made_again(
    stopwatch: Stopwatch, caplog: pytest.LogCaptureFixture
) -> None:
    stopwatch.seconds = {"plain": 50.0, "slow": 1.0}  # as if something had been in the way
    assert choose_backend(PROBLEM).name == "slow"
    stopwatch.seconds = {"plain": 0.4, "slow": 1.0}
    start_again()
    with caplog.at_level(logging.DEBUG, logger="hf_dynsparse"):
        assert choose_backend(PROBLEM).name == "plain"
    assert "is contradicted by" in caplog.text
    assert stopwatch.timed == 2
    start_again()
    assert choose_backend(PROBLEM).name == "plain"
    assert stopwatch.timed == 2


def test_scattered_timings_leave_it_to_the_rule_and_are_not_kept(stopwatch: Stopwatch) -> None:
    stopwatch.steady = False
    assert choose_backend(PROBLEM).name == "plain"
    (made,) = choice.plan.choices.values()
    assert made.why == "by rule: density 0.5 is at most 1; timings were scattered"
    assert not tuning.cache_file().exists()


def test_timings_of_a_busy_machine_are_used_but_not_kept(stopwatch: Stopwatch) -> None:
    stopwatch.calm = False
    assert choose_backend(PROBLEM).name == "slow"
    (made,) = choice.plan.choices.values()
    assert made.why == "timed: plain 2e+03 ms, slow 1e+03 ms; not kept, the machine was busy"
    assert not tuning.cache_file().exists()
    start_again()
    choose_backend(PROBLEM)
    assert stopwatch.timed == 2


@pytest.mark.parametrize(("seconds", "best"), [(1.09, "plain"), (1.11, "slow")])
def test_the_rule_decides_a_tie(stopwatch: Stopwatch, seconds: float, best: str) -> None:
    stopwatch.seconds["plain"] = seconds
    assert choose_backend(PROBLEM).name == best


def test_backends_that_were_not_there_are_timed(stopwatch: Stopwatch, monkeypatch: pytest.MonkeyPatch) -> None:
    choose_backend(PROBLEM)
    monkeypatch.setattr(choice, "BACKENDS", by_name(backend("fast"), backend("plain"), backend("slow")))
    stopwatch.seconds["fast"] = 0.5
    start_again()
    assert choose_backend(PROBLEM).name == "fast"


KEY = f"{PROBLEM} by plain, slow"
DAMAGED_NUMBERS = (None, "0.1", [], {}, True, 1, 10**400, 0.0, -1.0, math.inf, math.nan)
TIMES = {"plain": 0.1, "slow": 9.0}


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[1]",
        "null",
        "1",
        '"text"',
        "\0\xff",
        "[" * 100_000 + "]" * 100_000,
        '{"x":' * 100_000 + "1" + "}" * 100_000,
        json.dumps({KEY: {"seconds": TIMES, "when": 1.5}})[:-9],
        *(
            json.dumps({"x": 1, KEY: entry})
            for entry in (
                {},
                None,
                "text",
                [1, 2],
                3,
                TIMES,
                {"seconds": TIMES},
                {"seconds": {}, "when": 1.5},
                {"seconds": None, "when": 1.5},
                {"seconds": [0.1, 9.0], "when": 1.5},
                {"seconds": {"plain": 0.1}, "when": 1.5},
                {"seconds": {**TIMES, "other": 0.1}, "when": 1.5},
                *({"seconds": {**TIMES, "plain": bad}, "when": 1.5} for bad in DAMAGED_NUMBERS),
                *({"seconds": TIMES, "when": bad} for bad in DAMAGED_NUMBERS),
            )
        ),
    ],
    ids=lambda content: content[:60],
)
@pytest.mark.usefixtures("stopwatch")
def test_a_damaged_file_of_timings_is_measured_again(stopwatch: Stopwatch, content: str) -> None:
    tuning.cache_file().parent.mkdir()
    tuning.cache_file().write_text(content, encoding="latin-1")
    assert choose_backend(PROBLEM).name == "slow"
    assert stopwatch.timed == 1
    assert json.loads(tuning.cache_file().read_text()).keys() == {KEY}


def test_a_disk_that_cannot_be_written_is_no_error(
    stopwatch: Stopwatch, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(tuning, "cache_file", lambda: tmp_path / "file" / "kernels.json")
    assert choose_backend(PROBLEM).name == "slow"
    assert "cannot be kept" in caplog.text


def test_a_user_without_a_home_is_no_error(
    table: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(tuning, "cache_file", cache_file)
    monkeypatch.setattr(tuning.Path, "home", homeless)
    assert tuning.recall(PROBLEM, [backend("plain")]) is None
    tuning.remember(PROBLEM, [backend("plain")], tuning.Timing({"plain": 1.0}))
    assert caplog.text.count("Could not determine home directory") == 2


def test_choices_that_are_kept_are_used_and_no_others_timed(stopwatch: Stopwatch) -> None:
    choose_backend(PROBLEM)
    kept = [choice.choice_to_json(*item) for item in choice.plan.choices.items()]
    kept = json.loads(json.dumps(kept))
    stopwatch.seconds["slow"] = 3.0
    configure_kernels(tuning="force")
    made = dict(map(choice.choice_from_json, kept))
    choice.plan.fix(made)
    assert choose_backend(PROBLEM).name == "slow"
    assert made[PROBLEM].timed is not None
    assert choose_backend(replace(PROBLEM, tokens=4096)).name == "slow"  # as for the nearest number of tokens
    assert choose_backend(replace(PROBLEM, backward=True)).name == "plain"  # nothing like it: by rule
    assert stopwatch.timed == 1
    choice.plan.is_fixed = False
    assert choose_backend(replace(PROBLEM, tokens=1)).name == "plain"
    assert stopwatch.timed == 2


def test_the_workspace_can_be_forbidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "BACKENDS", by_name(backend("workspace"), backend("tiled")))
    assert choose_backend(PROBLEM).name == "workspace"
    configure_kernels(dense_workspace=False)
    assert choose_backend(PROBLEM).name == "tiled"


def test_the_summary_shows_what_was_chosen_why_and_when(stopwatch: Stopwatch, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = make_layer((3, 5), 4, 6)
    (row,) = topology_summary(layer).layers
    assert (row.backend, row.why) == ("plain", "not used yet; by rule: density 0.4 is at most 1")
    layer(torch.zeros(3, 20)).sum().backward()
    now = time.time()
    for later, age in ((0, "0 s"), (-9, "0 s"), (100, "2 min"), (7300, "2 h"), (3 * 86400, "3 days")):
        monkeypatch.setattr(time, "time", lambda later=later: now + later)
        (row,) = topology_summary(layer).layers
        assert row.backend == "slow"
        times = f"timed {age} ago: plain 2e+03 ms, slow 1e+03 ms"
        assert row.why == f"forward {times}; backward {times}"
    assert f"12x20 nnzb=6 by slow: {row.why}" in str(topology_summary(layer))
    with use_backend("plain"):
        (row,) = topology_summary(layer).layers
    assert (row.backend, row.why) == ("plain", "asked for with `use_backend`")


def test_the_kernels_of_the_device_that_do_not_serve_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    fast = replace(backend("fast", "is not built"), device="cpu")
    other = replace(backend("other", "runs elsewhere"), device="cuda")
    monkeypatch.setattr(choice, "BACKENDS", by_name(fast, other, backend("plain")))
    (row,) = topology_summary(make_layer((3, 5), 4, 6)).layers
    assert row.why == "not used yet; by rule: density 0.4 is at most 1; not fast: is not built"
    configure_kernels(tuning="once")
    choose_backend(PROBLEM)
    assert set(choice.plan.choices.values()) == {choice.Choice("plain", "no other can serve; not fast: is not built")}


def test_products_follow_the_plan_and_what_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    served = []

    def watched(name: str) -> Backend:
        return replace(backend(name), dds=lambda *operands: served.append(name) or reference.dds(*operands))

    monkeypatch.setattr(choice, "BACKENDS", by_name(watched("workspace"), watched("plain")))
    layer, input = make_layer().requires_grad_(False), torch.ones(3, 24)
    layer(input)
    with use_backend("plain"):
        layer(input)
    layer(input)
    made = dict(choice.plan.choices)
    choice.plan.fix({problem: choice.Choice("plain", "by hand") for problem in made})
    layer(input)
    configure_kernels(dense_workspace=True)
    layer(input)
    configure_kernels(dense_workspace=False)
    layer(input)
    assert served == ["workspace", "plain", "workspace", "plain", "workspace", "plain"]


def test_sizes_that_are_remembered_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice.KernelPlan, "MOST_SERVED", 5)
    layer = make_layer()
    for tokens in range(20):
        layer(torch.ones(tokens, 24))
        assert len(choice.plan.served) <= 5


@needs_kernels
@pytest.mark.parametrize("shape", [(3, 64), (1, 3, 64)])
def test_a_product_of_a_few_tokens_takes_few_calls(shape: tuple[int, ...]) -> None:
    layer, input, calls = BlockSparseLinear(64, 64, 16, 0.5), torch.ones(shape), []

    def note(frame: FrameType, event: str, _: object) -> None:
        if event == "call":
            calls.append(frame.f_code.co_name)

    with torch.no_grad(), use_backend("native"):
        layer(input)  # chooses, compares, derives
        sys.setprofile(note)
        try:
            layer(input)
        finally:
            sys.setprofile(None)
    calls = calls[calls.index("forward") :]
    assert len(calls) <= 8, calls


@pytest.mark.skipif(not [*Path(native.__file__).parent.glob("_native_*.so")], reason="the C++ kernels are not built")
def test_libraries_that_are_there_serve(monkeypatch):
    assert native.why_not(torch.device("cpu"), torch.float32, (1, 1)) is None
    monkeypatch.setattr(native, "INTERFACE_VERSION", 99)
    with pytest.raises(native.LibraryUnavailable, match="_native_portable.so must have interface 99. Got 4. Build it"):
        native.load_variant.__wrapped__("portable")


def test_a_library_that_is_not_there_or_none_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(native, "__file__", str(tmp_path / "native.py"))
    with pytest.raises(native.LibraryUnavailable, match="_native_portable.so is not built. Build it with a C"):
        native.load_variant.__wrapped__("portable")
    (tmp_path / "_native_portable.so").write_bytes(b"no library")
    with pytest.raises(native.LibraryUnavailable, match="_native_portable.so does not load .* Build it with a C"):
        native.load_variant.__wrapped__("portable")
