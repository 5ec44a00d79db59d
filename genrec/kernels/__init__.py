"""The operators of genrec. Each is a folder: `__init__.py` is the public function, `reference.py` the definition,
`op.py` the registration, `triton.py` the GPU kernels; docs/kernels/README.md explains them together."""

import warnings

import torch

from genrec.kernels.group_layer_norm import group_layer_norm
from genrec.kernels.library import load_native, load_triton, native_operators
from genrec.kernels.moe import moe_experts, moe_ffn, moe_route
from genrec.kernels.relu_attention import relu_attention, relu_attention_varlen
from genrec.kernels.rq_nearest import rq_nearest

NATIVE_ERROR = load_native()  # why the compiled kernels are missing, None when they are loaded
if NATIVE_ERROR:
    warnings.warn(f"genrec runs in plain PyTorch on the CPU, because {NATIVE_ERROR}", stacklevel=2)
if torch.version.cuda:
    load_triton()

__all__ = [
    "NATIVE_ERROR",
    "group_layer_norm",
    "moe_experts",
    "moe_ffn",
    "moe_route",
    "native_operators",
    "relu_attention",
    "relu_attention_varlen",
    "rq_nearest",
]
