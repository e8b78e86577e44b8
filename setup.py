import re
from pathlib import Path

from setuptools import find_packages, setup


HERE = Path(__file__).parent


def read_version() -> str:
    """The version stands in the package alone; it is read, not imported, so that building needs no torch."""
    source = (HERE / "src" / "hf_dynsparse" / "__init__.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "([^"]+)"', source, flags=re.MULTILINE)
    if found is None:
        raise RuntimeError('src/hf_dynsparse/__init__.py must hold a line `__version__ = "x.y.z"`. Found none.')
    return found.group(1)


# What the package was tested with stands in constraints.txt; these are the ranges it is meant for.
install_requires = [
    "torch>=2.9",
    "transformers>=5.23,<5.24",  # one minor version: the models build on how this one loads and initialises weights
    "accelerate>=1.15",
    "datasets>=5.2",
    "evaluate>=0.4.6",
    "huggingface_hub>=2.4",
    "safetensors>=0.8.0",
    "tokenizers",  # the range is the one transformers asks for
    "numpy",
    "tqdm",
]

extras = {}
extras["plots"] = ["matplotlib>=3.8"]
extras["triton"] = ["triton>=3.5; platform_system == 'Linux'"]
extras["test"] = ["pytest>=9.0", "pytest-xdist", "scikit-learn", *extras["plots"]]
extras["quality"] = ["ruff>=0.17", "mypy>=2.4"]

setup(
    name="hf_dynsparse",
    version=read_version(),
    description="Dynamic block-sparse pre-training of BERT for the Hugging Face ecosystem",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    keywords="dynamic sparse training, block sparsity, BERT, pre-training, transformers, deep learning",
    license="Apache-2.0",
    license_files=["LICENSE"],
    package_dir={"": "src"},
    packages=find_packages("src"),
    package_data={"hf_dynsparse": ["py.typed"]},
    python_requires=">=3.11",  # as transformers 5.23
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
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
