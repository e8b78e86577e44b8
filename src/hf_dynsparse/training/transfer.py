"""Text without labels to distil on: what the teacher answers stands in for them."""

import logging

import torch
from datasets import Dataset, concatenate_datasets
from torch import nn
from tqdm.auto import tqdm
from transformers import TrainingArguments
from transformers.data.data_collator import DataCollator


logger = logging.getLogger(__name__)


def with_transfer_set(
    train: Dataset, rows: Dataset, teacher: nn.Module, collate: DataCollator, args: TrainingArguments
) -> Dataset:
    """
    `train`, and then `rows` with the answers of `teacher` as labels: the class of the largest logit, or the number (a
    transfer set, arXiv:1908.08962, section 3). Each rank asks for all of them.

    Args:
        train (`Dataset`): token ids and `labels`.
        rows (`Dataset`): token ids.
        teacher (`nn.Module`): a classifier of sequences; left in evaluation mode on the device of `args`.
        collate (`Callable`): makes a batch of a list of rows.
        args ([`~transformers.TrainingArguments`]): device, size of a batch of evaluation, and whether to show a bar.
    """
    labels = torch.empty(len(rows), dtype=torch.float64)
    inputs = rows.remove_columns([name for name in rows.column_names if name == "labels"])
    lengths = [len(ids) for ids in inputs["input_ids"]]
    order = sorted(range(len(rows)), key=lambda row: -lengths[row])
    size = args.per_device_eval_batch_size
    teacher.to(args.device).eval()
    hidden = args.disable_tqdm or not args.should_log
    for start in tqdm(range(0, len(order), size), desc="label the transfer set", disable=hidden, leave=False):
        chosen = order[start : start + size]
        batch = collate([inputs[row] for row in chosen])
        with torch.no_grad():
            logits = teacher(**{name: x.to(args.device) for name, x in batch.items()}).logits
        answers = logits.squeeze(-1) if logits.shape[-1] == 1 else logits.argmax(-1)
        labels[torch.tensor(chosen)] = answers.double().cpu()
    kind = train.features["labels"].dtype
    answered = inputs.add_column("labels", [int(x) if "int" in kind else float(x) for x in labels])
    logger.info("%d examples of the task and %d that the teacher labels", len(train), len(rows))
    return concatenate_datasets([train, answered.select_columns(train.column_names).cast(train.features)])
