"""The Triton kernels behind the operators of op.py.

    triton_forward.py   the output
    triton_backward.py  gradients of q, k and v, and the choice between a deterministic and an atomic form
    triton_bias.py      gradient of rel_bias
    triton_tiles.py     what the kernels share
    triton_call.py      what their launches share

D and Dv up to 256; wider heads run in plain PyTorch. Matrix products take float16 and bfloat16 as they are and float32
as three products of TF32; all add in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from genrec.kernels.library import PLAIN, implement
from genrec.kernels.relu_attention.triton_backward import Gradients, gradients
from genrec.kernels.relu_attention.triton_call import TABLE as TABLE
from genrec.kernels.relu_attention.triton_call import dense, fits, packed
from genrec.kernels.relu_attention.triton_forward import attention

_atomic = False


@contextmanager
def atomic_gradients() -> Iterator[None]:
    """Backward passes that run inside add dQ and the gradient of rel_bias with atomics, for 5 products instead of 7:

        with atomic_gradients():
            loss.backward()

    Results then differ from run to run by rounding. `torch.use_deterministic_algorithms(True)` wins, and float32 heads
    wider than 128 keep the deterministic form. The choice holds for the process, for autograd runs backward passes in
    threads of its own.
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
    return gradients(grad, dense(q, k, v, *options), _with_atomics(q, v))


def relu_attention_varlen_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *options: Any) -> Gradients:
    if not fits(q, v):
        return PLAIN["relu_attention_varlen_backward"](grad, q, k, v, *options)
    return gradients(grad, packed(q, k, v, *options), _with_atomics(q, v))


def _with_atomics(q: Tensor, v: Tensor) -> bool:
    narrow = q.dtype != torch.float32 or max(q.shape[-1], v.shape[-1]) <= 128
    return _atomic and narrow and not torch.are_deterministic_algorithms_enabled()


def examples(dtype: torch.dtype, device: torch.device | str = "meta") -> Iterator[tuple[str, Callable[[], Any]]]:
    """Launches for compilation without a GPU: every kernel in every width, with the arguments that ask most of it."""
    for dim in (20, 64, 128, 256):
        tokens = partial(_empty, 8192, 4, dim, dtype=dtype, device=device)
        limit, cu_seqlens = (_empty(size, dtype=torch.int64, device=device) for size in (8192, 33))
        bias = _empty(4, 128, device=device)
        q, k, v = tokens(), tokens(), tokens()
        call = packed(q, k, v, cu_seqlens, cu_seqlens, 1024, 1024, limit, bias, None, False, 0.1, 0.0, True)
        yield f"D={dim}, packed, key_limit, rel_bias", partial(attention, call)
        yield f"D={dim}, packed, key_limit, rel_bias, backward", partial(gradients, q, call, False)
        if dtype != torch.float32 or dim <= 128:
            yield f"D={dim}, packed, key_limit, rel_bias, backward with atomics", partial(gradients, q, call, True)
        if dim < 64:
            continue
        for rows, keys, causal, rel_bias in (3, 3, True, None), (16, 4096, False, bias), (1024, 1024, False, bias):
            q, k, v = (_empty(8, 4, size, dim, dtype=dtype, device=device) for size in (rows, keys, keys))
            call = dense(q, k, v, None, rel_bias, None, causal, 0.1, 0.0, False)
            yield f"D={dim}, {rows} × {keys}", partial(attention, call)
            if keys < 4096:
                yield f"D={dim}, {rows} × {keys}, backward", partial(gradients, q, call, False)


def _empty(*shape: int, dtype: torch.dtype = torch.float32, device: torch.device | str) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=device)


implement("relu_attention", relu_attention)
implement("relu_attention_varlen", relu_attention_varlen)
implement("relu_attention_backward", relu_attention_backward)
implement("relu_attention_varlen_backward", relu_attention_varlen_backward)
