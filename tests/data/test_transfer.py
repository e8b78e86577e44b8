"""Text without labels among rows that have some."""

import math
from typing import Any

import pytest
import torch
from datasets import Dataset, Features, List, Value

from hf_dynsparse.data.transfer import is_unlabelled, with_transfer_set


@pytest.mark.parametrize(("dtype", "label"), [("int64", 1), ("float64", 2.5), ("float32", -1.0)])
def test_rows_without_labels_come_after_the_others(dtype: str, label: Any) -> None:
    """Columns that the task lacks are left out, and a number may be -1."""
    ids = {"input_ids": List(Value("int32")), "attention_mask": List(Value("int8"))}
    features = Features({"labels": Value(dtype), **ids})
    train = Dataset.from_dict(
        {"labels": [label], "input_ids": [[2, 9, 3]], "attention_mask": [[1, 1, 1]]}, features=features
    )
    rows = Dataset.from_dict(
        {
            "input_ids": [[2, 8, 3], [2, 3]],
            "token_type_ids": [[0] * 3, [0] * 2],
            "attention_mask": [[1] * 3, [1] * 2],
        }
    )
    both = with_transfer_set(train, rows)
    assert both.features == features
    assert list(both["input_ids"]) == [[2, 9, 3], [2, 8, 3], [2, 3]]
    assert both[0]["labels"] == label
    missing = torch.tensor(both["labels"])
    assert is_unlabelled(missing).tolist() == [False, True, True]
    assert all(math.isnan(x) if "float" in dtype else x == -1 for x in both["labels"][1:])
