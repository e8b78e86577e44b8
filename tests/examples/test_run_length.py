"""How long the training scripts train: steps, epochs, or both."""

import importlib
import logging
import sys
from pathlib import Path
from typing import Any

import pytest

from hf_dynsparse.training.scripts import check_run_length
from tests.scripts import EXAMPLES
from tests.toy import toy_trainer


REWOUND = {"method": "prune_ofa", "num_topology_updates": None, "learning_rate_rewinding": True}


@pytest.fixture(scope="module")
def scripts() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        names = ("run_mlm", "run_glue", "run_qa", "run_embedding")
        names = (*(f"{name}_dynsparse" for name in names), "run_earlybert")
        yield {name: importlib.import_module(name) for name in names}
        for name in names:
            sys.modules.pop(name)


@pytest.mark.parametrize(
    ("script", "kind", "given", "steps", "epochs"),
    [
        ("run_mlm_dynsparse", "RunArguments", {}, 500, 3.0),
        ("run_mlm_dynsparse", "RunArguments", {"num_train_epochs": 1.0}, -1, 1.0),
        ("run_mlm_dynsparse", "RunArguments", {"max_steps": 7}, 7, 3.0),
        ("run_mlm_dynsparse", "RunArguments", {"max_steps": -1}, -1, 3.0),
        ("run_mlm_dynsparse", "RunArguments", {"max_steps": -1, "num_train_epochs": 2.0}, -1, 2.0),
        ("run_mlm_dynsparse", "RunArguments", {"max_steps": 7, "num_train_epochs": 2.0}, 7, 2.0),
        ("run_glue_dynsparse", "RunArguments", {}, -1, None),  # by the recipe
        ("run_glue_dynsparse", "RunArguments", {"max_steps": 7}, 7, None),
        ("run_glue_dynsparse", "RunArguments", {"max_steps": 7, "num_train_epochs": 2.0}, 7, 2.0),
        ("run_qa_dynsparse", "RunArguments", {"max_steps": 7, "num_train_epochs": 2.0}, 7, 2.0),
        ("run_embedding_dynsparse", "RunArguments", {}, -1, 1.0),
        ("run_embedding_dynsparse", "RunArguments", {"max_steps": 7}, 7, 1.0),
        ("run_embedding_dynsparse", "RunArguments", {"max_steps": 7, "num_train_epochs": 2.0}, 7, 2.0),
        ("run_earlybert", "MlmArguments", {"num_train_epochs": 1.0}, -1, 1.0),
        ("run_earlybert", "TaskArguments", {}, -1, 3.0),
        ("run_earlybert", "TaskArguments", {"max_steps": 7}, 7, 3.0),
        ("run_earlybert", "TaskArguments", {"max_steps": 7, "num_train_epochs": 2.0}, 7, 2.0),
    ],
)
def test_steps_or_epochs(
    scripts: Any,
    script: str,
    kind: str,
    given: dict[str, Any],
    steps: int,
    epochs: float | None,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    args = getattr(scripts[script], kind)(output_dir=str(tmp_path), use_cpu=True, **given)
    assert (args.max_steps, args.num_train_epochs) == (steps, epochs)
    warned = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    both = given.get("max_steps", -1) > 0 and "num_train_epochs" in given
    assert any("Got 7 and 2: the run has 7 steps" in line for line in warned) is both


@pytest.mark.parametrize(
    ("kind", "given", "steps"),
    [
        ("MlmArguments", {}, 500),
        ("MlmArguments", {"train_epochs": 2.0}, -1),  # whatever the schedule of the search
        ("MlmArguments", {"train_epochs": 2.0, "max_steps": 7}, 7),
        ("TaskArguments", {"train_epochs": 2.0}, -1),
        ("TaskArguments", {"train_epochs": 2.0, "max_steps": 7}, 7),
    ],
)
def test_epochs_of_a_ticket(
    scripts: Any, kind: str, given: dict[str, Any], steps: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    args = getattr(scripts["run_earlybert"], kind)(output_dir=str(tmp_path), use_cpu=True, **given)
    assert args.train_steps == steps
    assert ("`max_steps` goes before `train_epochs`" in caplog.text) is (len(given) == 2)


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ({}, None),
        ({"num_topology_updates": None}, None),
        ({"num_topology_updates": 5}, None),
        ({"num_topology_updates": 6}, r"must lie in \[0, 5\] for 6 steps"),
        ({"max_steps": 7, "num_topology_updates": 6}, None),
        ({"num_topology_updates": None, "topology_first_step": 9, "topology_update_every": 2}, "total_steps = 6"),
        ({**REWOUND, "warmup_steps": 1}, None),
        ({**REWOUND, "warmup_steps": 3}, "Got 6 steps, a window from 0 to 3 and 3 steps of warm-up"),
    ],
)
def test_updates_must_fit_the_steps_that_epochs_make(given: dict[str, Any], error: str | None, tmp_path: Path) -> None:
    """24 examples in batches of four: six steps."""
    trainer = toy_trainer(tmp_path, **{"max_steps": -1, "num_train_epochs": 1, **given})
    if error is None:
        check_run_length(trainer)
    else:
        with pytest.raises(ValueError, match=error):
            check_run_length(trainer)
