import platform
import re
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext


HERE = Path(__file__).parent


def read_version() -> str:
    """The version stands in the package alone; it is read, not imported, so that building needs no torch."""
    source = (HERE / "src" / "hf_dynsparse" / "__init__.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "([^"]+)"', source, flags=re.MULTILINE)
    if found is None:
        raise RuntimeError('src/hf_dynsparse/__init__.py must hold a line `__version__ = "x.y.z"`. Found none.')
    return found.group(1)


# The kernels of the CPU, compiled once per instruction set; ops/native.py picks one when the package runs.
# -ffast-math would reorder the running sums and spill them to memory: slower, and not reproducible.
COMPILE = [
    *("-std=c++17", "-O3", "-g0", "-ffp-contract=fast", "-fno-math-errno"),
    *("-fopenmp", "-fvisibility=hidden", "-Wall", "-Wextra"),
]
HEADERS = sorted(path.relative_to(HERE).as_posix() for path in HERE.glob("csrc/*.hpp"))
# By the beginning of its name, a library's source and variants.
LIBRARIES = {"native": ("block_sparse", {"portable": []}), "native_int8": ("int8", {"portable": []})}
if platform.machine() in ("x86_64", "AMD64"):
    V3, V4 = "-march=x86-64-v3", "-march=x86-64-v4"
    for _, variants in LIBRARIES.values():
        variants |= {"x86_64_v3": [V3], "x86_64_v4": [V4]}
    LIBRARIES["native"][1]["x86_64_v4_bf16"] = [V4, "-mavx512bf16"]
    LIBRARIES["native_int8"][1].update({"x86_64_v3_vnni": [V3, "-mavxvnni"], "x86_64_v4_vnni": [V4, "-mavx512vnni"]})


def native_extension(library: str, source: str, variant: str, flags: list[str]) -> Extension:
    """One variant of the kernels. Optional: without a compiler the package installs and does without it."""
    return Extension(
        f"hf_dynsparse.ops._{library}_{variant}",
        sources=[f"csrc/{source}.cpp"],
        depends=HEADERS,
        language="c++",
        extra_compile_args=COMPILE + flags,
        extra_link_args=["-fopenmp"],
        optional=True,
    )


class BuildLibraries(build_ext):
    """Builds plain shared libraries for ctypes: no Python in them, none in their names."""

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", "/") + ".so"

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return []

    def build_extension(self, ext: Extension) -> None:
        # All variants come from the same sources: each needs a folder for its objects.
        shared, self.build_temp = self.build_temp, str(Path(self.build_temp) / ext.name)
        try:
            super().build_extension(ext)
        finally:
            self.build_temp = shared


class PlatformWheel(bdist_wheel):
    """A wheel of one platform and every Python version: the libraries depend on nothing else."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


# What the package was tested with stands in constraints.txt; these are the ranges it is meant for.
install_requires = [
    "torch>=2.13",  # the oldest tested; 2.9 neither compiles the loss nor exports to ONNX
    "transformers>=5.23,<6",  # the newest tested minor is in src/hf_dynsparse/_transformers.py
    "accelerate>=1.15",
    "datasets>=5.2",
    "evaluate>=0.4.6",
    "huggingface_hub>=2.4",
    "safetensors>=0.8.0",
    "tokenizers",  # the range is the one transformers asks for
    "filelock>=4.2.11",  # lets go of a lock in processes that are forked
    "fsspec",  # the range is the one datasets asks for
    "jinja2",  # reports; the range is the one torch asks for
    "numpy",
    "pyyaml",  # plan files; the range is the one transformers asks for
    "tqdm",
]

extras = {}
extras["docs"] = ["mkdocs>=1.6,<2", "mkdocs-material>=9.8", "mkdocstrings[python]>=1.0"]
extras["glue"] = ["scikit-learn"]  # scores; scipy comes with it
extras["monitoring"] = ["tensorboard>=2.20"]  # with Pillow, for the pictures
extras["onnx"] = ["onnx>=1.23", "onnxruntime>=1.30", "onnxscript>=0.7.2"]  # export, and running what was exported
extras["peft"] = ["peft>=0.21.2,<0.22"]  # LoRA layers build on how this minor version registers them
extras["plots"] = ["matplotlib>=3.8"]
# examples/pareto_study.py; datasets asks for the first two.
extras["study"] = ["pandas", "pyarrow", *extras["plots"]]
extras["triton"] = ["triton>=3.7.1; platform_system == 'Linux' and platform_machine == 'x86_64'"]
extras["test"] = [
    *("pytest>=9.0", "pytest-xdist"),
    *(extras["docs"] + extras["glue"] + extras["monitoring"] + extras["onnx"] + extras["peft"] + extras["study"]),
    *extras["triton"],
]
extras["quality"] = ["ruff>=0.17", "mypy>=2.4"]

# The scripts go along in the wheel, for `hf-dynsparse train`; a checkout has them where they are.
EXAMPLES = [
    "hf_dynsparse.examples",
    *(
        f"hf_dynsparse.examples.{folder}"
        for folder in ("accelerate", "plans", "plugins", "prune_ofa", "studies", "study")
    ),
]

setup(
    name="hf_dynsparse",
    version=read_version(),
    description="Dynamic block-sparse pre-training of BERT for the Hugging Face ecosystem",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    keywords="dynamic sparse training, block sparsity, BERT, pre-training, transformers, deep learning",
    license="Apache-2.0",
    license_files=["LICENSE"],
    package_dir={"": "src", "hf_dynsparse.examples": "examples"},
    packages=[*find_packages("src"), *EXAMPLES],
    py_modules=["hf_dynsparse_cli"],
    package_data={
        "hf_dynsparse": ["py.typed", "*/*.md", "reports/page/*.*"],
        **dict.fromkeys(EXAMPLES, ["*.ipynb", "*.yaml", "*.html", "*.md"]),
    },
    ext_modules=[
        native_extension(library, source, variant, flags)
        for library, (source, variants) in LIBRARIES.items()
        for variant, flags in variants.items()
    ],
    cmdclass={"build_ext": BuildLibraries, "bdist_wheel": PlatformWheel},
    python_requires=">=3.11",  # as transformers 5.23
    entry_points={"console_scripts": ["hf-dynsparse=hf_dynsparse_cli:main"]},
    install_requires=install_requires,
    extras_require=extras,
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
