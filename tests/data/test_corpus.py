"""The embedded corpus, built from small synthetic packages: the real one takes a minute."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from hf_dynsparse.data import embedded_corpus
from hf_dynsparse.data.corpus import corpus_files, find_modules, installed_versions, is_validation, write_corpus


MODULE = '''# This comment is about the module and it is long enough to be kept,
# even though it takes up two lines of the file.
"""The first docstring of the module {name}, which is here to be found."""


def function(value):
    """The docstring of the function, which is the same in all of the modules."""
    # an ordinary comment in the body of the function that says why it is so
    raise ValueError("the message of an error is not among the texts that are kept")


TEXT = "\\d is an invalid escape, at which the parser is not to raise a warning."
'''

Package = Callable[..., Path]


@pytest.fixture
def make_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Package:
    """Write an installed package of some modules and put it on the path."""

    def make(name: str, modules: dict[str, str], version: str = "1.0") -> Path:
        site = tmp_path / "site"
        for module, source in modules.items():
            file = site / name / module
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(source)
        metadata = site / f"{name}-1.dist-info" / "METADATA"
        metadata.parent.mkdir(exist_ok=True)
        metadata.write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        if str(site) not in sys.path:
            monkeypatch.syspath_prepend(site)
        return site / name

    return make


def small_modules() -> dict[str, str]:
    words = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    names = [f"{tens}_{ones}" for tens in words for ones in words]
    return {f"{name}.py": MODULE.format(name=name.replace("_", " and ")) for name in names} | {"__init__.py": ""}


def test_modules_are_sorted_and_tests_left_out(make_package: Package) -> None:
    root = make_package(
        "small_a", {"b.py": "", "__init__.py": "", "sub/__init__.py": "", "tests/c.py": "", "a.txt": ""}
    )
    make_package("small_a", {"sub/test_d.py": "", "sub/data-files/e.py": ""})
    assert find_modules("small_a") == [
        ("small_a", root / "__init__.py"),
        ("small_a.b", root / "b.py"),
        ("small_a.sub", root / "sub" / "__init__.py"),
    ]
    assert "small_a" not in sys.modules


def test_format_order_and_removal_of_repeated_paragraphs(tmp_path: Path) -> None:
    name = next(f"m{i}" for i in range(100) if not is_validation(f"m{i}"))
    module = tmp_path / "module.py"
    module.write_text(MODULE.format(name="that"))
    broken = tmp_path / "broken.py"
    broken.write_text("def broken(:\n")
    files = corpus_files(tmp_path / "corpus")
    # The second copy of the module has nothing new, and nothing can be read from the third file.
    write_corpus([(name, module), (name, module), (name, broken)], tmp_path / "corpus", progress=False)
    assert files.validation_file.read_text() == ""
    assert files.train_file.read_text() == (
        f"= {name} =\n"
        "This comment is about the module and it is long enough to be kept, even though it takes up two lines of the"
        " file.\n"
        "The first docstring of the module that, which is here to be found.\n"
        "The docstring of the function, which is the same in all of the modules.\n"
        "An ordinary comment in the body of the function that says why it is so\n"
    )


def test_corpus_is_cached_by_version_and_split_by_document(make_package: Package, tmp_path: Path) -> None:
    modules = small_modules()
    # A document has at least two paragraphs, and all but the first module lose those that they share.
    for name in modules:
        topic = name.removesuffix(".py").replace("_", " or ")
        modules[name] += f'"""What this module is about is {topic}, and not any other thing."""\n'
    make_package("small_b", modules)
    cache = tmp_path / "cache"
    files = embedded_corpus(cache, min_bytes=1, progress=False, packages=["small_b", "not_installed_anywhere"])
    assert [path.parent for path in files] == list(cache.iterdir()) * 2
    assert sorted(files[0].parent.iterdir()) == sorted(files)
    train, valid = ([text.splitlines()[1:] for text in file.read_text().split("\n\n")] for file in files)
    assert len(train) + len(valid) == 100
    assert 0 < len(valid) < 20
    paragraphs = [text for document in train + valid for text in document]
    assert len(paragraphs) == len(set(paragraphs))

    files.train_file.write_text("taken from the cache")
    assert embedded_corpus(cache, min_bytes=1, progress=False, packages=["small_b"]) == files
    assert files.train_file.read_text() == "taken from the cache"

    make_package("small_b", modules, version="2.0")
    assert installed_versions(["small_b"]) == {"small_b": "2.0"}
    assert embedded_corpus(cache, min_bytes=1, progress=False, packages=["small_b"]) != files


@pytest.mark.parametrize("lost", ["train.txt", "validation.txt"])
def test_a_corpus_without_one_of_its_files_is_built_again(make_package: Package, tmp_path: Path, lost: str) -> None:
    make_package("small_d", small_modules())
    files = embedded_corpus(tmp_path / "cache", min_bytes=1, progress=False, packages=["small_d"])
    whole = [file.read_bytes() for file in files]
    (files.train_file.parent / lost).unlink()
    embedded_corpus(tmp_path / "cache", min_bytes=1, progress=False, packages=["small_d"])
    assert [file.read_bytes() for file in files] == whole
    assert sorted(files.train_file.parent.iterdir()) == sorted(files)


def test_too_little_prose_is_an_error(make_package: Package, tmp_path: Path) -> None:
    make_package("small_c", {"__init__.py": ""})
    with pytest.raises(ValueError, match=r"at least 1,000,000 bytes .* not installed: not_installed_anywhere\."):
        embedded_corpus(tmp_path, 1_000_000, progress=False, packages=["small_c", "not_installed_anywhere"])


def test_split_depends_on_the_name_alone() -> None:
    share = sum(is_validation(f"package.module_{number}") for number in range(4000)) / 4000
    assert 0.04 < share < 0.06


def test_the_standard_library_is_found() -> None:
    names = [name for name, _ in find_modules("python")]
    assert {"argparse", "asyncio.base_events", "pydoc_data.topics"} <= set(names)
    assert not any("test" in name.split(".") or "site-packages" in name for name in names)
