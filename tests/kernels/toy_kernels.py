"""Kernels that are right and wrong in one way each, for the tests of the compile check and of tuning."""

from pathlib import Path

import torch
import triton
import triton.language as tl

from genrec.kernels.launch import Table, launch

TABLE = Table(Path(__file__).with_name("toy_launch.csv"))


@triton.jit
def scale(x, y, n, factor, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i, mask=i < n).to(tl.float32) * factor, mask=i < n)


@triton.jit
def multiply(a_MK, b_KN, c_MN, K, N, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr):
    m = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    sums = tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        a = tl.load(a_MK + m[:, None] * K + k[None, :])
        sums = tl.dot(a, tl.load(b_KN + k[:, None] * N + n[None, :]), sums, input_precision=PRECISION)
    tl.store(c_MN + m[:, None] * N + n[None, :], sums)


@triton.jit
def exact_multiply(a_MK, b_KN, c_MN, K, N, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr):
    multiply(a_MK, b_KN, c_MN, K, N, BLOCK, BLOCK_K, "ieee")


EXACT = {"exact_multiply"}


def scaled(x: torch.Tensor) -> torch.Tensor:
    config, y = TABLE.config("scale", x, size=x.numel()), torch.empty_like(x)
    launch(scale, (config["PROGRAMS"],), x, y, x.numel(), 2.0, BLOCK=config["BLOCK"], num_warps=config["num_warps"])
    return y


def multiplied(a: torch.Tensor, b: torch.Tensor, block: int, block_k: int, precision: str | None, **options: int):
    c = a.new_empty(a.shape[0], b.shape[1], dtype=torch.float32)
    grid, sizes = (a.shape[0] // block, b.shape[1] // block), (a.shape[1], b.shape[1])
    if precision:
        launch(multiply, grid, a, b, c, *sizes, BLOCK=block, BLOCK_K=block_k, PRECISION=precision, **options)
    else:
        launch(exact_multiply, grid, a, b, c, *sizes, BLOCK=block, BLOCK_K=block_k, **options)
    return c


def examples(dtype: torch.dtype, device: torch.device | str = "meta"):
    x = torch.randn(1024, 1024, dtype=dtype, device=device)
    yield "scale", lambda: scaled(x[0])
    yield "multiply", lambda: multiplied(x, x, 64, 32, "tf32x3")
    yield "multiply again", lambda: multiplied(x, x, 64, 32, "tf32x3")
    if dtype == torch.float32:
        yield "exact", lambda: multiplied(x, x, 32, 32, None)
