"""
The packages that train with a really sparse weight on the processor, both unstructured. Measured on request, never a
dependency.
"""

import os
from importlib import import_module
from importlib.metadata import version
from types import ModuleType

import torch
from torch import nn


PEERS = {"sparselab": "0.2.2", "sparseprop": "0.1.14"}


def build_peers(linear: nn.Linear) -> dict[str, nn.Module]:
    """
    Layers of the peers with the non-zero weights of `linear`, by package and version.

    Raises:
        ValueError: if one is missing, with the command that installs it.
    """
    # sparselab carries an OpenMP of its own, which never hears of `torch.set_num_threads`.
    os.environ["OMP_NUM_THREADS"] = str(torch.get_num_threads())
    builders = {"sparselab": _sparselab_layer, "sparseprop": _sparseprop_layer}
    layers = {name: build(_load(name), linear) for name, build in builders.items()}
    return {f"{name} {version(name)}": layer for name, layer in layers.items()}


def _load(name: str) -> ModuleType:
    try:
        return import_module(name)
    except ImportError as error:
        wanted = " ".join(f"{peer}=={number}" for peer, number in PEERS.items())
        raise ValueError(
            f"`--peers` needs {' and '.join(PEERS)}. Could not import {name} ({error}). Install them, with torch "
            f"as it is: pip install torch=={version('torch').partition('+')[0]} {wanted} (sparseprop needs a compiler)"
        ) from error


def _sparselab_layer(package: ModuleType, linear: nn.Linear) -> nn.Module:
    # Its transposed matrices are kept by `id`, which a later layer may get again.
    import_module("sparselab.ops")._clear_transpose_cache()
    layer = package.SparseLinear(linear.in_features, linear.out_features, sparsity=0.9)
    # The layer draws a pattern of its own: put ours in the place of it.
    layer._csr = package.PaddedCSR.from_dense(linear.weight.detach())
    layer._values = nn.Parameter(torch.as_tensor(layer._csr.values))
    layer.bias = nn.Parameter(linear.bias.detach().clone())
    return layer


def _sparseprop_layer(package: ModuleType, linear: nn.Linear) -> nn.Module:
    return import_module("sparseprop.modules").SparseLinear.from_dense(linear)
