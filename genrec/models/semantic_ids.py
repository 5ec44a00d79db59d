"""One id per item: residual codes made unique, and ids for items that come later.

Items whose features are alike get the same codes. The prefix, all levels but the last, says what an item is like and is
kept; the last level only has to tell apart the items under a prefix, so that is where collisions are resolved.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from genrec.kernels import rq_nearest

Prefix = tuple[int, ...]


@dataclass(frozen=True)
class Resolution:
    """Unique codes and what they cost. Errors are mean squares, per element, of what codes leave of latents."""

    codes: NDArray[np.int64]  # (N, levels), no two rows alike
    colliding: int  # items that shared their nearest codes with another item
    moved: int  # items that did not keep their nearest codes
    spilled: int  # of those, items that had to leave a full prefix
    error_before: float
    error_after: float

    def report(self) -> dict[str, int | float]:
        """Everything but the codes, for logs."""
        return {name: value for name, value in vars(self).items() if name != "codes"}


def resolve_collisions(latents: Tensor, codebooks: Sequence[Tensor]) -> Resolution:
    """Unique codes for latents (N, D) under codebooks, one (K_l, D) tensor a level.

    An item that is alone on its nearest codes keeps them. Under each prefix the items that share a code are matched to
    the codes still free there at the least total squared distance. Where a prefix holds more items than the last
    codebook has codes, the matching leaves the worst-fitting items over; they are placed as new items are, see
    `assign_new`. Deterministic. Raises ValueError if there are more items than ids.
    """
    check_capacity(len(latents), [len(codebook) for codebook in codebooks])
    nearest, quantized = rq_nearest(latents, list(codebooks))
    codes = nearest.numpy().copy()
    colliding = _colliding(codes)
    table = _Table(codebooks, codes[~colliding])
    spilled: list[int] = []
    for prefix, rows in _by_prefix(codes, np.flatnonzero(colliding)).items():
        free = table.free_codes(prefix)
        distances = table.last_distances(latents[rows].numpy(), prefix)[:, free]
        matched, columns = linear_sum_assignment(distances)
        for row, code in zip(rows[matched], free[columns], strict=True):
            codes[row, -1] = code
            table.take(codes[row])
        spilled += np.delete(rows, matched).tolist()
    for row in sorted(spilled):
        codes[row] = table.place(latents[row].numpy())
    return Resolution(
        codes=codes,
        colliding=int(colliding.sum()),
        moved=int((codes != nearest.numpy()).any(1).sum()),
        spilled=len(spilled),
        error_before=_error(latents, quantized),
        error_after=_error(latents, sum_of_codes(codes, codebooks)),
    )


def assign_new(latents: Tensor, codebooks: Sequence[Tensor], taken: NDArray[np.int64]) -> Resolution:
    """Unique codes for new latents (N, D) beside the codes `taken` (M, levels) by older items, which stay as they are.

    In the order of the rows, each takes its nearest codes if they are free, else the nearest free last-level code under
    its prefix, else under the nearest prefix with room: the one that shares the most levels, then the nearest code at
    the level where they part. Raises ValueError if there are more items than ids or `taken` does not fit the codebooks.
    """
    check_capacity(len(latents) + len(taken), [len(codebook) for codebook in codebooks])
    _check_taken(taken, codebooks)
    nearest, quantized = rq_nearest(latents, list(codebooks))
    codes = nearest.numpy().copy()
    table = _Table(codebooks, taken)
    colliding = _colliding(np.concatenate([taken, codes]))[len(taken) :]
    for row, wanted in enumerate(codes):
        codes[row] = wanted if table.is_free(wanted) else table.find(latents[row].numpy())
        table.take(codes[row])
    return Resolution(
        codes=codes,
        colliding=int(colliding.sum()),
        moved=int((codes != nearest.numpy()).any(1).sum()),
        spilled=int((codes[:, :-1] != nearest.numpy()[:, :-1]).any(1).sum()),
        error_before=_error(latents, quantized),
        error_after=_error(latents, sum_of_codes(codes, codebooks)),
    )


def sum_of_codes(codes: NDArray[np.int64], codebooks: Sequence[Tensor]) -> Tensor:
    """(N, D): what the codes (N, levels) stand for."""
    rows = torch.from_numpy(codes)
    return torch.stack([codebook[rows[:, level]] for level, codebook in enumerate(codebooks)]).sum(0)


def code_tokens(codes: Sequence[int]) -> list[str]:
    """A row of codes as the tokens of an index.json: ["<a_12>", "<b_3>", "<c_250>"]."""
    return [f"<{chr(ord('a') + level)}_{code}>" for level, code in enumerate(codes)]


def check_capacity(items: int, codebook_sizes: Sequence[int]) -> None:
    """Raise ValueError where there are more items than ids."""
    if items > math.prod(codebook_sizes):
        raise ValueError(
            f"{items} items do not fit into the {math.prod(codebook_sizes)} ids of codebook_sizes "
            f"{list(codebook_sizes)}; expected larger codebooks or more levels"
        )


class _Table:
    """Which codes are taken, prefix by prefix."""

    def __init__(self, codebooks: Sequence[Tensor], taken: NDArray[np.int64]) -> None:
        self.codebooks = [codebook.numpy() for codebook in codebooks]
        self.size = len(self.codebooks[-1])
        self.taken: dict[Prefix, set[int]] = {}
        for row in taken:
            self.take(row)

    def take(self, codes: NDArray[np.int64]) -> None:
        *prefix, last = codes.tolist()
        self.taken.setdefault(tuple(prefix), set()).add(last)

    def is_free(self, codes: NDArray[np.int64]) -> bool:
        *prefix, last = codes.tolist()
        return last not in self.taken.get(tuple(prefix), ())

    def free_codes(self, prefix: Prefix) -> NDArray[np.int64]:
        """Last-level codes that no item holds under `prefix`, in order."""
        free = np.ones(self.size, dtype=bool)
        free[list(self.taken.get(prefix, ()))] = False
        return np.flatnonzero(free)

    def last_distances(self, latents: NDArray[np.float32], prefix: Prefix) -> NDArray[np.float64]:
        """(N, K): squared distance of latents (N, D) to every last-level code under `prefix`."""
        residual = latents.astype(np.float64)
        for codebook, code in zip(self.codebooks, prefix, strict=False):
            residual = residual - codebook[code]
        return _squared_distances(residual, self.codebooks[-1])

    def find(self, latent: NDArray[np.float32]) -> NDArray[np.int64]:
        """(levels,): the nearest free code under the nearest prefix with room."""
        residual = latent.astype(np.float64)
        prefix = next(p for p in self._prefixes(residual, ()) if len(self.taken.get(p, ())) < self.size)
        free = self.free_codes(prefix)
        distances = self.last_distances(latent[None], prefix)[0, free]
        return np.array([*prefix, free[distances.argmin()]])

    def place(self, latent: NDArray[np.float32]) -> NDArray[np.int64]:
        codes = self.find(latent)
        self.take(codes)
        return codes

    def _prefixes(self, residual: NDArray[np.float64], prefix: Prefix) -> Iterator[Prefix]:
        """All prefixes, nearest first: depth first over the levels, at each the codes by distance to the residual."""
        level = len(prefix)
        if level == len(self.codebooks) - 1:
            yield prefix
            return
        distances = _squared_distances(residual[None], self.codebooks[level])[0]
        for code in distances.argsort(kind="stable").tolist():
            yield from self._prefixes(residual - self.codebooks[level][code], (*prefix, code))


def _squared_distances(x: NDArray[np.float64], y: NDArray[np.float32]) -> NDArray[np.float64]:
    """(N, K): between every row of x (N, D) and of y (K, D)."""
    return np.square(x).sum(1)[:, None] - 2 * x @ y.T + np.square(y, dtype=np.float64).sum(1)


def _colliding(codes: NDArray[np.int64]) -> NDArray[np.bool_]:
    """(N,): rows that are not the only ones of their kind."""
    _, inverse, counts = np.unique(codes, axis=0, return_inverse=True, return_counts=True)
    return counts[inverse.reshape(-1)] > 1


def _by_prefix(codes: NDArray[np.int64], rows: NDArray[np.int64]) -> dict[Prefix, NDArray[np.int64]]:
    groups: dict[Prefix, list[int]] = {}
    for row in rows.tolist():
        groups.setdefault(tuple(codes[row, :-1].tolist()), []).append(row)
    return {prefix: np.array(group) for prefix, group in groups.items()}


def _error(latents: Tensor, quantized: Tensor) -> float:
    return (latents - quantized).square().mean().item() if len(latents) else 0.0


def _check_taken(taken: NDArray[np.int64], codebooks: Sequence[Tensor]) -> None:
    sizes = [len(codebook) for codebook in codebooks]
    if taken.ndim != 2 or taken.shape[1] != len(sizes):
        raise ValueError(f"taken has shape {taken.shape}; expected (items, {len(sizes)}), one column a codebook")
    if ((taken < 0) | (taken >= np.array(sizes))).any():
        raise ValueError(f"taken holds codes outside codebooks of sizes {sizes}")
    if len(taken) and _colliding(taken).any():
        raise ValueError("taken holds an id more than once; expected one id an item")
