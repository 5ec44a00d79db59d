"""Residual quantization: the nearest code of every level, all levels in one call."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from genrec.kernels.checks import check_device, check_dims, check_floating, check_shape
from genrec.kernels.library import entry
from genrec.kernels.rq_nearest import op as op

__all__ = ["rq_nearest"]

_rq_nearest = entry("rq_nearest")


def rq_nearest(x: Tensor, codebooks: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Level by level: the code nearest to the residual in squared distance, subtract it, go on.

    Residual quantization as in RQ-VAE (Lee et al. 2022; TIGER, Rajput et al. 2023).

    Args:
        x: (N, D) floating, any strides.
        codebooks: L tensors (K_l, D) of one floating dtype, L at least 1, any K_l at least 1.

    Returns:
        codes: (N, L) int64, codes[:, l] in [0, K_l). Among equal distances the lowest index.
        quantized: (N, D) in the codebooks' dtype, Σ_l codebooks[l][codes[:, l]]. Its gradient goes to the codebooks;
            x gets none.

    The search compares ‖c‖² − 2 r·c in float32 (float64 for float64), whatever the input's precision and autocast: the
    code is the nearest one up to the rounding of that expression, at most D · 2⁻²³ · (‖c‖² + 2 ‖r‖ ‖c‖). A row with NaN
    or infinity gets some valid code.

    Raises:
        ValueError: a shape or device that does not fit. TypeError: a dtype that does not fit.
    """
    if not _usual(x, codebooks):
        _check(x, codebooks)
    quantized, codes = _rq_nearest(x, list(codebooks))
    return codes, quantized


def _usual(x: Tensor, codebooks: Sequence[Tensor]) -> bool:
    """Whether everything fits, in one look: asking one by one takes longer than a small search."""
    if x.dim() != 2 or not x.is_floating_point() or len(codebooks) == 0:
        return False
    dim, device, dtype = x.shape[1], x.device, codebooks[0].dtype
    return dtype.is_floating_point and all(
        len(shape := codebook.shape) == 2
        and shape[0] > 0
        and shape[1] == dim
        and codebook.dtype is dtype
        and codebook.device == device
        for codebook in codebooks
    )


def _check(x: Tensor, codebooks: Sequence[Tensor]) -> None:
    """Says what does not fit."""
    check_dims("x", x, "(N, D)")
    check_floating(x=x)
    if len(codebooks) == 0:
        raise ValueError("codebooks is empty; expected at least one tensor (K, D)")
    for level, codebook in enumerate(codebooks):
        name = f"codebooks[{level}]"
        check_dims(name, codebook, "(K, D)")
        check_shape(name, codebook, (codebook.shape[0], x.shape[1]), "(K, D)")
        check_device(x.device, **{name: codebook})
        if codebook.shape[0] == 0:
            raise ValueError(f"{name} has 0 codes; expected at least 1")
        if codebook.dtype != codebooks[0].dtype or not codebook.dtype.is_floating_point:
            raise TypeError(f"{name} is {codebook.dtype}; expected one floating-point dtype in all codebooks")
