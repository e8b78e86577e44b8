"""
The GPU kernels as a kernel repository of the Hub, for `kernels.get_kernel`: this folder, and the files of the package
that the kernels need.

    python hub_kernel/assemble.py dynsparse-linear

writes a folder that is a project of `kernel-builder` (build.toml, flake.nix, torch-ext) and holds what it would build
(build/torch-cuda), for pure Python needs no compiler. Nothing is uploaded.
"""

import base64
import hashlib
import json
import shutil
import sys
import tomllib
from pathlib import Path


HERE = Path(__file__).parent
PACKAGE = HERE.parent / "src" / "hf_dynsparse"
MODULES = ("blocks/dense.py", "blocks/layout.py", "blocks/sizes.py")
MODULES += ("ops/checks.py", "ops/reference.py", "ops/triton.py", "ops/triton_kernels.py")


def assemble(target: Path) -> Path:
    """
    Write the repository into `target`, and return the folder of the built kernel in it.

    Raises:
        FileExistsError: if `target` exists.
    """
    shutil.copytree(HERE, target, ignore=shutil.ignore_patterns("assemble.py", "__pycache__"))
    general = tomllib.loads((HERE / "build.toml").read_text(encoding="utf-8"))["general"]
    source = target / "torch-ext" / general["name"].replace("-", "_")
    for module in MODULES:
        copy = source / module
        copy.parent.mkdir(exist_ok=True)
        copy.with_name("__init__.py").touch()
        shutil.copyfile(PACKAGE / module, copy)
    built = target / "build" / "torch-cuda"
    shutil.copytree(source, built)
    shutil.copyfile(target / "CARD.md", target / "build" / "CARD.md")
    digests = {
        file.relative_to(built).as_posix(): base64.b64encode(hashlib.sha256(file.read_bytes()).digest()).decode()
        for file in sorted(built.rglob("*.py"))
    }
    content = hashlib.sha256(json.dumps(digests).encode()).hexdigest()[:7]
    metadata = {
        "id": f"_{source.name}_cuda_{content}",
        **{key: general[key] for key in ("name", "version", "license")},
        "python-depends": [],
        "backend": {"type": "cuda"},
        "digest": {"algorithm": "sha256", "files": digests},
    }
    (built / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")
    return built


if __name__ == "__main__":
    assemble(Path(*sys.argv[1:]))
