"""The nearest code: searches of one level, (N, D) and (K, D) → (N,)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bench.peers import installed, on_gpu

Search = Callable[[Tensor, Tensor], Tensor]


def addmm(x: Tensor, codebook: Tensor) -> Tensor:
    """Fair: the vendor's matrix product with the norms added inside, and one pass for the least."""
    return torch.addmm(codebook.square().sum(1), x, codebook.T, alpha=-2).argmin(1)


def addmm_in_chunks(x: Tensor, codebook: Tensor, rows: int = 256) -> Tensor:
    """Fair: the same with distances that stay in cache."""
    norms = codebook.square().sum(1)
    return torch.cat([torch.addmm(norms, part, codebook.T, alpha=-2).argmin(1) for part in x.split(rows)])


def cdist(x: Tensor, codebook: Tensor) -> Tensor:
    """Fair: what most people write."""
    return torch.cdist(x, codebook).argmin(1)


def searches() -> dict[str, Search]:
    """PyTorch's forms, and the libraries people take for it, where they are installed. Fair: each is tuned for just
    this search on its device."""
    found: dict[str, Search] = {"addmm": addmm, "addmm in chunks": addmm_in_chunks, "cdist": cdist}
    if on_gpu():
        if kmeans := installed("flash_kmeans.assign_euclid_triton", "flash-kmeans"):
            found["flash-kmeans"] = lambda x, codebook: kmeans.euclid_assign_triton(
                x[None], codebook[None], x.square().sum(1)[None]
            )[0].long()
        return found
    if metrics := installed("sklearn.metrics", "scikit-learn"):
        nearest = metrics.pairwise_distances_argmin
        found["scikit-learn"] = lambda x, codebook: torch.from_numpy(nearest(x.numpy(), codebook.numpy()))
    if faiss := installed("faiss", "faiss-cpu"):
        found["faiss"] = lambda x, codebook: torch.from_numpy(faiss.knn(x.numpy(), codebook.numpy(), 1)[1][:, 0])
    return found


def residual(search: Search) -> Callable[[Tensor, list[Tensor]], tuple[Tensor, Tensor]]:
    """All levels with the search of one."""

    def levels(x: Tensor, codebooks: list[Tensor]) -> tuple[Tensor, Tensor]:
        codes, rest = [], x
        for codebook in codebooks:
            codes.append(search(rest, codebook))
            rest = rest - codebook[codes[-1]]
        return torch.stack(codes, 1), x - rest

    return levels
