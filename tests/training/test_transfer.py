"""Text that a teacher labels."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset, Features, List, Value
from torch import nn
from transformers import DataCollatorWithPadding, TrainingArguments

from hf_dynsparse.training.transfer import with_transfer_set
from tests.toy import toy_tokenizer


class Sums(nn.Module):
    """A teacher whose logits are the sum of the token ids that are not padding and, of two classes, eleven."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.classes, self.seen = classes, list[int]()

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **_: Any) -> Any:
        self.seen.append(input_ids.shape[1])
        sums = (input_ids * attention_mask).sum(1, keepdim=True).float()
        return SimpleNamespace(logits=torch.cat([sums, torch.full_like(sums, 11.0)], 1)[:, : self.classes])


@pytest.mark.parametrize(("classes", "dtype", "labels"), [(1, "float64", [30.0, 5.0, 12.0]), (2, "int64", [0, 1, 0])])
def test_its_answers_are_the_labels(tmp_path: Any, classes: int, dtype: str, labels: list[float]) -> None:
    """In the order of the rows, although batches are of similar length; columns that the task lacks are left out."""
    ids = Features({"input_ids": List(Value("int32")), "attention_mask": List(Value("int8"))})
    train = Dataset.from_dict(
        {"input_ids": [[2, 9, 3]], "attention_mask": [[1, 1, 1]], "labels": [1]},
        features=Features({**ids, "labels": Value(dtype)}),
    )
    rows = Dataset.from_dict(
        {
            "input_ids": [[2, 8, 8, 9, 3], [2, 3], [2, 7, 3]],
            "attention_mask": [[1] * 5, [1] * 2, [1] * 3],
            "token_type_ids": [[0] * 5, [0] * 2, [0] * 3],
        }
    )
    args = TrainingArguments(tmp_path, per_device_eval_batch_size=2, use_cpu=True, disable_tqdm=True, report_to=[])
    teacher = Sums(classes)
    found = with_transfer_set(train, rows, teacher, DataCollatorWithPadding(toy_tokenizer()), args)
    assert found["labels"] == [1, *labels]
    assert found["input_ids"] == [[2, 9, 3], *rows["input_ids"]]
    assert found.features == train.features
    assert teacher.seen == [5, 2]
    assert not teacher.training
