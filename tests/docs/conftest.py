"""What the documentation does to this process is undone."""

import sys
from collections.abc import Iterator
from typing import Any

import pytest

from hf_dynsparse.ops import BACKENDS
from hf_dynsparse.topology import SCORES
from hf_dynsparse.topology.methods import METHODS


@pytest.fixture(autouse=True)
def tables() -> Iterator[None]:
    """What a page registers is taken away."""
    before: list[tuple[dict[str, Any], dict[str, Any]]] = [(it, dict(it)) for it in (SCORES, METHODS, BACKENDS)]
    yield
    for table, rows in before:
        for name in table.keys() - rows.keys():
            del table[name]
    sys.modules.pop("fresh_gradient", None)
