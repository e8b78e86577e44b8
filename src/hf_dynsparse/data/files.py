"""Files of a user: which may be given, reading them into rows, and what is wrong with one that cannot be read."""

import codecs
import csv
import gzip
import hashlib
import io
import json
import os
import zlib
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

from datasets import Dataset, IterableDataset, NamedSplit, Value, load_dataset
from datasets.exceptions import DatasetsError


# Loader of `datasets` by the ending of a file, which may be followed by `.gz`.
FILE_FORMATS = {"txt": "text", "csv": "csv", "tsv": "csv", "json": "json", "jsonl": "json", "parquet": "parquet"}
GZIP_MAGIC, PARQUET_MAGIC = b"\x1f\x8b", b"PAR1"
HEAD = 1 << 16
BAD_GZIP = (EOFError, zlib.error, gzip.BadGzipFile)
# What readers of the formats raise for their content.
UNREADABLE = (*BAD_GZIP, DatasetsError, ValueError, TypeError, NotImplementedError, RecursionError, csv.Error)

# Which flag asks for a split.
SPLIT_FLAGS = {"train": "--do_train", "validation": "--do_eval", "test": "--do_predict"}


class DataError(ValueError):
    """What is wrong with a user's data: rule, what was received, the fix."""


def ending_of(path: str) -> str:
    """Ending of a file without the dot, and without `.gz`."""
    return Path(path.removesuffix(".gz")).suffix.lstrip(".")


def check_file(path: str, flag: str, endings: Collection[str] = tuple(FILE_FORMATS)) -> None:
    """
    Refuse, by its name and first block alone, a file that cannot be read or holds nothing.

    Args:
        path (`str`): the file.
        flag (`str`): the argument that names it, for the error.
        endings (`Collection[str]`): those allowed, keys of `FILE_FORMATS`.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: for another ending, or a file that is damaged, of another format or empty.
    """
    if ending_of(path) not in endings:
        raise DataError(f"`{flag}` must end in .{', .'.join(endings)}, plain or .gz. Got {path}.")
    if not os.path.isfile(path):
        raise FileNotFoundError(f"`{flag}` must be an existing file. Got {path}, which does not exist.")
    damage = _damage_of_head(path)
    if damage is not None:
        raise _damaged(path, *damage)
    with reading(path), open_bytes(path) as file:
        if not any(block.strip() for block in iter(lambda: file.read(HEAD), b"")):
            raise DataError(f"`{flag}` must hold something. Got {path}, which is empty. Give another file.")


def check_needed(files: Collection[str], needed: Collection[str]) -> None:
    """
    Refuse `files`, by the names of their splits, that lack one of the `needed` splits; where there are no files, the
    data come from elsewhere.

    Raises:
        ValueError: naming the flag that is missing, and the one that asks for the split.
    """
    for split in needed:
        if files and split not in files:
            flag = SPLIT_FLAGS[split]
            raise ValueError(f"`{flag}` needs a `--{split}_file`. Got none. Give it, or `{flag} false`.")


def row_limits(args: Any) -> dict[str, int | None]:
    """How many rows of each split are used at most, by the flags of `args`."""
    return {
        "train": args.max_train_samples,
        "validation": args.max_eval_samples,
        "test": args.max_predict_samples,
    }


def read_file(
    path: str, split: str = "train", cache_dir: str | None = None, streaming: bool = False
) -> Dataset | IterableDataset:
    """
    The rows of a file, kept in the cache until the file changes, or read while they are used.

    A line of text is a row with the column `text`. Cells of a CSV file are what stands there: `null` and `NA` are
    words. Columns that hold nothing but numbers hold numbers, except while streaming.

    Args:
        path (`str`): a file with one of the endings of `FILE_FORMATS`, plain or `.gz`.
        split (`str`): what the rows are called.
        cache_dir (`str`, *optional*): where prepared data is kept.
        streaming (`bool`): whether to read while training.

    Raises:
        ValueError: naming the file, and the line where that is known; while streaming when the row's turn comes.
    """
    if streaming:
        return IterableDataset.from_generator(_stream, gen_kwargs={"path": path}, split=NamedSplit(split))
    with reading(path):
        if file_format(path) != "csv":
            return _load(path, split, cache_dir)
        rows = Dataset.from_generator(
            read_table,
            cache_dir=cache_dir,
            gen_kwargs={"path": path},
            split=NamedSplit(split),
            fingerprint=fingerprint_of(path, split),
        )
        return _with_numbers(rows)


def file_format(path: str) -> str | None:
    """Name of the loader for a file, by its ending; `None` if there is none."""
    return FILE_FORMATS.get(ending_of(path))


def read_table(path: str) -> Iterator[dict[str, str]]:
    """
    The rows of a CSV file, or of a `.tsv` one, in which nothing is quoted. Blank lines are passed over.

    Raises:
        ValueError: for a row with more or fewer fields than the header, a quote without an end, or no row.
    """
    is_tsv = ending_of(path) == "tsv"
    how: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if is_tsv else {"strict": True}
    csv.field_size_limit(2**31 - 1)  # a field may be a whole document
    empty = True
    with reading(path), io.TextIOWrapper(open_bytes(path), encoding="utf-8-sig", newline="") as text:
        rows = csv.reader(text, **how)
        header = [name.strip() for name in next(rows, [])]
        if len(set(header)) < len(header) or not all(header):
            raise DataError(f"The header of {path} must name each column, differently. Got {header}. Rename them.")
        for row in rows:
            if row and len(row) != len(header):
                raise DataError(
                    f"Each row of {path} must have {len(header)} fields, as its header. Got {len(row)} in line "
                    f"{rows.line_num}. {'Take out tabs.' if is_tsv else 'Put quotes around fields with a comma.'}"
                )
            if row:
                empty = False
                yield dict(zip(header, row, strict=True))
    if empty:
        raise _no_row(path)


def _stream(path: str) -> Iterator[dict[str, Any]]:
    if file_format(path) == "csv":
        yield from read_table(path)
        return
    empty = True
    with reading(path):
        for row in load_dataset(file_format(path), data_files=path, split="train", streaming=True):
            empty = False
            yield row
    if empty:
        raise _no_row(path)


def _load(path: str, split: str, cache_dir: str | None) -> Dataset:
    try:
        rows = load_dataset(file_format(path), data_files={split: path}, split=split, cache_dir=cache_dir)
    except ValueError:
        next(_stream(path))  # fails, and says so, if there is no row
        raise
    if file_format(path) != "text":
        rows.data.validate(full=True)  # readers of JSON and Parquet let invalid UTF-8 pass
    return rows


def _no_row(path: str) -> DataError:
    return DataError(f"Data must hold at least one row. Got {path}, which holds none. Give another file.")


def _with_numbers(rows: Dataset) -> Dataset:
    """Columns of strings that all are numbers, as numbers: the other formats have them so."""
    features = rows.features.copy()
    for name in rows.column_names:
        for kind in ("int64", "float64"):
            try:
                rows.data.column(name).cast(kind)
            except ValueError:
                continue
            features[name] = Value(kind)
            break
    return rows if features == rows.features else rows.cast(features)


def open_bytes(path: str) -> IO[bytes]:
    """Open a file, unpacked if its name or its first bytes say that it is gzip."""
    with open(path, "rb") as file:
        is_gzip = path.endswith(".gz") or file.read(len(GZIP_MAGIC)) == GZIP_MAGIC
    return cast(IO[bytes], gzip.open(path)) if is_gzip else open(path, "rb")


def fingerprint_of(path: str, split: str = "train") -> str:
    """Another one whenever the file is, without a look into it."""
    about = os.stat(path)
    facts = (os.path.abspath(path), about.st_size, about.st_mtime_ns, split)
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


@contextmanager
def reading(source: str) -> Iterator[None]:
    """
    Turn whatever a reader raises for the content of `source`, a file or data set, into one error that names it.

    Raises:
        ValueError: with what is wrong and, where that can be told, the line. Errors of the system stay what they are.
    """
    try:
        yield
    except UNREADABLE as error:
        cause = error.__cause__ if isinstance(error, DatasetsError) and error.__cause__ else error
        if isinstance(cause, DataError) or (isinstance(cause, OSError) and not isinstance(cause, BAD_GZIP)):
            raise cause from None
        what = find_damage(source) if os.path.isfile(source) else None
        if what is None:
            what = f"{type(cause).__name__}: {(str(cause).strip() or 'no reason').splitlines()[0]}", "Correct it."
        raise _damaged(source, *what) from error


def _damaged(source: str, received: str, fix: str) -> DataError:
    return DataError(f"Data must be whole, of the format of its name, in UTF-8. Got {source}: {received}. {fix}")


def find_damage(path: str) -> tuple[str, str] | None:
    """
    What is wrong with the bytes of a file, and what to do about it; `None` if they are what its name says. Reads all
    of it: for a file that a reader has stumbled over.
    """
    damage = _damage_of_head(path)
    if damage is not None or file_format(path) == "parquet":
        return damage
    lines = 0
    try:
        with open_bytes(path) as file:
            for line in file:
                line.decode()
                lines += 1
    except UnicodeDecodeError as error:
        return f"byte {error.object[error.start]:#x} in line {lines + 1}, which is not UTF-8", "Save it as UTF-8."
    except BAD_GZIP:
        return f"gzip that is cut or damaged after line {lines}", "Copy or compress it again."
    return _damage_of_json(path) if file_format(path) == "json" else None


def _damage_of_head(path: str) -> tuple[str, str] | None:
    """The same by the first block alone."""
    if file_format(path) == "parquet":
        return None if path.endswith(".gz") else _damage_of_parquet(path)
    decoder = codecs.getincrementaldecoder("utf-8")()  # the block may end within a character
    try:
        with open_bytes(path) as file:
            head = file.read(HEAD)
        if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or head.count(0) * 4 > len(head):
            return "UTF-16 or something else with many zero bytes", "Save it as UTF-8."
        decoder.decode(head, final=len(head) < HEAD)
    except UnicodeDecodeError as error:
        number = head.count(b"\n", 0, error.start) + 1
        return f"byte {head[error.start]:#x} in line {number}, which is not UTF-8", "Save it as UTF-8."
    except BAD_GZIP:
        return "gzip that is cut or damaged, or none", "Copy or compress it again."
    return None


def _damage_of_parquet(path: str) -> tuple[str, str] | None:
    """A file that is cut lacks its end."""
    with open(path, "rb") as file:
        begin = file.read(len(PARQUET_MAGIC))
        file.seek(max(0, os.path.getsize(path) - len(PARQUET_MAGIC)))
        is_whole = begin == file.read() == PARQUET_MAGIC
    return None if is_whole else ("no Parquet, or one that is cut", "Copy or write it again.")


def _damage_of_json(path: str) -> tuple[str, str] | None:
    """Of a document, or of one a line."""
    number = 0
    try:
        with open_bytes(path) as file:
            for number, line in enumerate(file, start=1):
                entry = json.loads(line) if line.strip() else {}
                if not isinstance(entry, dict | list):
                    return f"{type(entry).__name__} instead of an object in line {number}", 'Write {"text": ...}.'
        return None
    except json.JSONDecodeError as error:
        reason = f"{error.msg} in line {number}"
    except RecursionError:
        reason = f"lists or objects nested too deep in line {number}"
    if number == 1:
        try:
            with open_bytes(path) as file:
                json.loads(file.read())
            return None
        except json.JSONDecodeError as error:
            reason = f"{error.msg} in line {error.lineno}"
    return f"no JSON: {reason}", "Is it cut? Correct it, or write it again."
