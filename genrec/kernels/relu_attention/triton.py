"""The Triton kernels behind the operators of op.py.

    triton_forward.py   the output
    triton_backward.py  gradients of q, k and v, and the choice between a deterministic and an atomic form
    triton_bias.py      gradient of rel_bias
    triton_tiles.py     what the kernels share
    triton_call.py      what their launches share

D and Dv up to 256; wider heads run in plain PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from genrec.kernels.library import PLAIN, implement
from genrec.kernels.relu_attention.triton_backward import Gradients, gradients
from genrec.kernels.relu_attention.triton_call import dense, fits, packed
from genrec.kernels.relu_attention.triton_forward import attention

_atomic = False


@contextmanager
def atomic_gradients() -> Iterator[None]:
    """Backward passes that run inside add dQ and the gradient of rel_bias with atomics, for 5 products instead of 7:

        with atomic_gradients():
            loss.backward()

    Results then differ from run to run by rounding. `torch.use_deterministic_algorithms(True)` wins. The choice holds for
    the process, for autograd runs backward passes in threads of its own.
    """
    global _atomic
    before, _atomic = _atomic, True
    try:
        yield
    finally:
        _atomic = before


def relu_attention(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> Tensor:
    if not fits(q, v):
        return PLAIN["relu_attention"](q, k, v, *options)
    return attention(dense(q, k, v, *options))


def relu_attention_varlen(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> Tensor:
    if not fits(q, v):
        return PLAIN["relu_attention_varlen"](q, k, v, *options)
    return attention(packed(q, k, v, *options))


def relu_attention_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *options: Any) -> Gradients:
    if not fits(q, v):
        return PLAIN["relu_attention_backward"](grad, q, k, v, *options)
    return gradients(grad, dense(q, k, v, *options), _with_atomics())


def relu_attention_varlen_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *options: Any) -> Gradients:
    if not fits(q, v):
        return PLAIN["relu_attention_varlen_backward"](grad, q, k, v, *options)
    return gradients(grad, packed(q, k, v, *options), _with_atomics())


def _with_atomics() -> bool:
    return _atomic and not torch.are_deterministic_algorithms_enabled()


implement("relu_attention", relu_attention)
implement("relu_attention_varlen", relu_attention_varlen)
implement("relu_attention_backward", relu_attention_backward)
implement("relu_attention_varlen_backward", relu_attention_varlen_backward)
