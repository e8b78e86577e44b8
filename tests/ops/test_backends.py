"""The choice among backends."""

import logging

import pytest
import torch

from hf_dynsparse import choose_backend, use_backend
from hf_dynsparse.ops import BACKENDS, backends, reference


CPU = torch.device("cpu")


def backend(name: str, reason: str | None) -> backends.Backend:
    """A backend that serves unless it has a reason."""
    return backends.Backend(name, f"the {name} one", lambda *_: reason, reference.dds, reference.sdd)


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three backends, of which the first does not serve."""
    entries = backend("fast", "needs B >= 16"), backend("plain", None), backend("slow", None)
    monkeypatch.setattr(backends, "BACKENDS", entries)
    monkeypatch.setattr(backends, "_logged", set())


def test_names_are_unique_and_the_reference_comes_last() -> None:
    names = [entry.name for entry in BACKENDS]
    assert len(set(names)) == len(names)
    assert names[-1] == "reference"


def test_the_first_that_serves_is_chosen_unless_another_is_asked_for(table: None) -> None:
    assert choose_backend(CPU, torch.float32, (4, 4)).name == "plain"
    with use_backend("slow"):
        assert choose_backend(CPU, torch.float32, (4, 4)).name == "slow"
        with use_backend("plain"):
            assert choose_backend(CPU, torch.float32, (4, 4)).name == "plain"
        assert choose_backend(CPU, torch.float32, (4, 4)).name == "slow"
    assert choose_backend(CPU, torch.float32, (4, 4)).name == "plain"


def test_the_override_ends_with_an_exception(table: None) -> None:
    with pytest.raises(KeyError), use_backend("slow"):
        raise KeyError
    assert choose_backend(CPU, torch.float32, (4, 4)).name == "plain"


def test_a_backend_that_was_asked_for_and_does_not_serve_says_why(table: None) -> None:
    message = r"No backend serves 4 x 8 blocks of torch.float16 on cpu: fast: needs B >= 16$"
    with use_backend("fast"), pytest.raises(ValueError, match=message):
        choose_backend(CPU, torch.float16, (4, 8))


def test_every_reason_is_given_when_none_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "BACKENDS", (backend("fast", "needs B >= 16"), backend("gpu", "needs CUDA")))
    with pytest.raises(ValueError, match="fast: needs B >= 16; gpu: needs CUDA"):
        choose_backend(CPU, torch.float32, (1, 1))


def test_an_unknown_name_is_an_error(table: None) -> None:
    with (
        pytest.raises(ValueError, match="`use_backend` takes one of fast, plain, slow. Got 'cuda'."),
        use_backend("cuda"),
    ):
        pass


def test_a_choice_is_logged_once_with_its_reason(table: None, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="hf_dynsparse"):
        for _ in range(3):
            choose_backend(CPU, torch.float32, (4, 8))
        assert caplog.messages == [
            "4 x 8 blocks of torch.float32 on cpu: backend 'plain' (the plain one); not fast: needs B >= 16"
        ]
        choose_backend(CPU, torch.bfloat16, (4, 8))
    assert len(caplog.messages) == 2
