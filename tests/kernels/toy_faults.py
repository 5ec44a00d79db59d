"""Examples of everything that the compile check must refuse, and nothing else."""

import torch
from toy_kernels import multiplied


def examples(dtype: torch.dtype, device: torch.device | str = "meta"):
    x = torch.randn(1024, 1024, dtype=dtype, device=device)
    yield "shared memory", lambda: multiplied(x, x, 64, 128, "tf32", num_stages=5)
    yield "spill", lambda: multiplied(x, x, 128, 32, "tf32x3", num_warps=4)
    yield "no tensor cores", lambda: multiplied(x, x, 32, 32, "ieee")
    yield "does not compile", lambda: multiplied(x, x, 48, 32, "tf32")
