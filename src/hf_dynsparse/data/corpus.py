"""The embedded default corpus: the English prose that installed Python packages carry in their source."""

import ast
import gc
import hashlib
import importlib.util
import logging
import os
import platform
import re
import sysconfig
import warnings
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import constants
from tqdm.auto import tqdm

from ..files import write_atomically
from .prose import clean_text


logger = logging.getLogger(__name__)

FORMAT_VERSION = 1  # part of the cache key: raise it when the text for the same packages changes
STANDARD_LIBRARY = "python"
# Fixed, so that two environments with the same versions of these agree, whatever else is installed in them.
DEFAULT_PACKAGES = (
    STANDARD_LIBRARY,
    *("torch", "transformers", "numpy", "pandas", "sympy", "networkx", "mpmath", "huggingface_hub", "datasets"),
    *("accelerate", "evaluate", "tokenizers", "safetensors", "pyarrow", "fsspec", "aiohttp", "anyio", "click"),
    *("dill", "filelock", "jinja2", "markupsafe", "multiprocess", "packaging", "psutil", "regex", "requests", "rich"),
    *("tqdm", "typer", "typing_extensions", "urllib3", "setuptools", "pip"),
)
SKIPPED_FOLDERS = frozenset({"test", "tests", "testing", "idlelib", "lib2to3", "site-packages", "dist-packages"})
MAX_SOURCE_BYTES = 2_000_000
MIN_TEXT_LENGTH = 40
VALIDATION_SHARE = 0.05
COMMENT = re.compile(r"(?:^[ \t]*#(?:[ :].*)?\n)+", re.MULTILINE)
COMMENT_SIGN = re.compile(r"^[ \t]*#:? ?", re.MULTILINE)
# Nodes to look into for documentation. Formatted strings and error messages, fragments mostly, are not among them.
TEXT_HOLDERS = (
    *(ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef, ast.If, ast.Try, ast.With, ast.For),
    *(ast.Expr, ast.Assign, ast.AnnAssign, ast.Call, ast.keyword, ast.Dict, ast.List, ast.Tuple),
)


class EmbeddedCorpus(NamedTuple):
    """The two plain-text files of the embedded corpus."""

    train_file: Path
    validation_file: Path


def embedded_corpus(
    cache_dir: str | Path | None = None,
    min_bytes: int = 8_000_000,
    progress: bool = True,
    packages: Sequence[str] = DEFAULT_PACKAGES,
) -> EmbeddedCorpus:
    """
    Build, or take from the cache, a pre-training corpus that needs no download: the prose of docstrings and comments
    of the standard library and of the packages that are installed with this one.

    The text depends on nothing but the versions of these packages. A document is a module: a line
    `= dotted.module.name =`, then one paragraph a line; a blank line separates documents. About one document in
    twenty, chosen by its name, goes to the validation file.

    Args:
        cache_dir (`str` or `Path`, *optional*):
            Folder for the two files. Defaults to `hf_dynsparse` in the Hugging Face home (`HF_HOME`).
        min_bytes (`int`, *optional*, defaults to 8,000,000):
            Least size of both files together.
        progress (`bool`, *optional*, defaults to `True`):
            Whether to show a progress bar while the corpus is built (about a minute).
        packages (`Sequence[str]`, *optional*):
            Import names to read, `"python"` for the standard library. Those that are not installed are passed over.

    Returns:
        `EmbeddedCorpus`: The paths `(train_file, validation_file)`.

    Raises:
        ValueError: If the installed packages hold less prose than `min_bytes`.
    """
    versions = installed_versions(packages)
    key = repr((FORMAT_VERSION, sorted(versions.items())))
    fingerprint = hashlib.sha256(key.encode()).hexdigest()[:16]
    directory = Path(constants.HF_HOME, "hf_dynsparse") if cache_dir is None else Path(cache_dir)
    files = corpus_files(directory / f"embedded-{fingerprint}")
    if not all(file.is_file() for file in files):
        logger.info("Building the embedded corpus in %s (once for these package versions).", directory)
        modules = [module for package in versions for module in find_modules(package)]
        write_corpus(modules, files.train_file.parent, progress)
    size = sum(file.stat().st_size for file in files)
    if size < min_bytes:
        missing = [package for package in packages if package not in versions]
        raise ValueError(
            f"The embedded corpus must hold at least {min_bytes:,} bytes (`min_bytes`). Got {size:,} bytes of prose"
            f" from {len(versions)} packages; not installed: {', '.join(missing) or 'none'}. Install the missing"
            " packages, pass a smaller `min_bytes`, or train on text files of your own."
        )
    return files


def installed_versions(packages: Iterable[str]) -> dict[str, str]:
    """Versions by import name, in the order given, `"python"` for the standard library; of what is installed."""
    versions: dict[str, str] = {}
    for package in packages:
        if package == STANDARD_LIBRARY:
            versions[package] = platform.python_version()
        elif importlib.util.find_spec(package) is not None:
            try:
                versions[package] = version(package)
            except PackageNotFoundError:
                logger.warning("%s can be imported but has no version: it is left out of the corpus.", package)
    return versions


def find_modules(package: str) -> list[tuple[str, Path]]:
    """
    Dotted names of the modules of an installed package and their files, without its tests, sorted by name. The package
    is not imported.
    """
    if package == STANDARD_LIBRARY:
        root = parent = Path(sysconfig.get_paths()["stdlib"])
    else:
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            return []
        origin = Path(spec.origin)
        if spec.submodule_search_locations is None:
            return [(package, origin)] if origin.suffix == ".py" else []
        root, parent = origin.parent, origin.parent.parent
    modules: list[tuple[str, Path]] = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(name for name in subfolders if name not in SKIPPED_FOLDERS and name.isidentifier())
        for name in names:
            file = Path(folder, name)
            if file.suffix == ".py" and not name.startswith(("test_", "conftest")):
                parts = file.relative_to(parent).with_suffix("").parts
                modules.append((".".join(parts).removesuffix(".__init__"), file))
    return sorted(modules)


def corpus_files(folder: Path) -> EmbeddedCorpus:
    """The two files of a corpus in its folder."""
    return EmbeddedCorpus(folder / "train.txt", folder / "validation.txt")


def write_corpus(modules: Sequence[tuple[str, Path]], folder: Path, progress: bool = True) -> None:
    """
    Write the prose of modules, given by name and source file, to a training and a validation file in `folder`. Where a
    paragraph is repeated, the first module keeps it.

    Each file appears whole or not at all, and a corpus is only taken from the cache when both are there. Several
    processes may build it at once: they write the same.
    """
    parts: tuple[list[str], list[str]] = ([], [])
    seen: set[str] = set()
    collecting = gc.isenabled()
    gc.disable()  # syntax trees are many objects and no cycles: collection would take a third of the time
    try:
        for name, file in tqdm(modules, desc="Embedded corpus", unit="module", disable=not progress):
            paragraphs = [text for text in module_prose(file) if is_new(text, seen)]
            if len(paragraphs) > 1:
                parts[is_validation(name)].append("\n".join([f"= {name} =", *paragraphs]) + "\n")
    finally:
        if collecting:
            gc.enable()
    for target, documents in zip(corpus_files(folder), parts, strict=True):
        write_atomically(target, "\n".join(documents))


def module_prose(file: Path) -> Iterator[str]:
    """
    The paragraphs of prose of a Python source file, in the order of the file. One that is too large, or no valid
    Python of this version, has none.
    """
    if file.stat().st_size > MAX_SOURCE_BYTES:
        return
    source = file.read_bytes().decode("utf-8", errors="replace").replace("\r\n", "\n")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in the files of others
            tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return
    texts = list(literal_strings(tree))
    line = 1
    end = 0
    for match in COMMENT.finditer(source):
        line += source.count("\n", end, match.start())
        end = match.start()
        texts.append((line, COMMENT_SIGN.sub("", match.group())))
    for _, text in sorted(texts):
        yield from clean_text(text)


def literal_strings(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield line number and text of docstrings and of other documentation: long literals assigned or passed."""
    stack: list[ast.AST] = [tree]
    while stack:
        node = stack.pop()
        if isinstance(node, ast.Constant):
            if isinstance(node.value, str) and len(node.value) >= MIN_TEXT_LENGTH:
                yield node.lineno, node.value
        elif isinstance(node, TEXT_HOLDERS):
            stack.extend(ast.iter_child_nodes(node))


def is_new(paragraph: str, seen: set[str]) -> bool:
    """Whether no paragraph with the same lower-case words came before: names and numbers do not count."""
    words = " ".join(re.findall(r"\b[a-z]{2,}\b", paragraph))
    new = words not in seen
    seen.add(words)
    return new


def is_validation(name: str) -> bool:
    """Whether the document of this name belongs to the validation file."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") < VALIDATION_SHARE * 2**32
