"""Codes for a catalogue, and the codebooks they come from, by the libraries people take for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.peers import installed
from bench.peers.rq_nearest import Search, residual, searches
from genrec.kernels import rq_nearest

ITERATIONS = 25  # of k-means, as many as ours


def assigners(x: Tensor, codebooks: list[Tensor]) -> dict[str, Callable[[], Tensor]]:
    """Items (N, D) → codes (N, levels). Fair: of the searches that `rq_nearest` is raced against, the fast ones that do
    not hold the distances of all rows at once, level by level."""

    def level_by_level(search: Search) -> Callable[[], Tensor]:
        form = residual(search)
        return lambda: form(x, codebooks)[0]

    slow = {"addmm", "cdist", "scikit-learn"}
    found = {name: level_by_level(search) for name, search in searches().items() if name not in slow}
    if faiss := installed("faiss", "faiss-cpu"):
        found["faiss RQ"] = _faiss_codes(faiss, x, codebooks)
    return found


def learners(x: Tensor, sizes: Sequence[int]) -> dict[str, Callable[[], list[Tensor]]]:
    """Items (N, D) → one codebook (K, D) a level, by residual k-means."""
    found: dict[str, Callable[[], list[Tensor]]] = {}
    if faiss := installed("faiss", "faiss-cpu"):
        found["faiss RQ"] = lambda: _faiss_codebooks(faiss, x, sizes)
    if cluster := installed("sklearn.cluster", "scikit-learn"):
        found["mini-batches"] = lambda: _mini_batches(cluster, x, sizes)
    return found


def _faiss_codes(faiss: ModuleType, x: Tensor, codebooks: list[Tensor]) -> Callable[[], Tensor]:
    """Fair: with a beam of one its algorithm is this one, and it holds the codebooks before the clock starts."""
    quantizer = _faiss_quantizer(faiss, [len(codebook) for codebook in codebooks], x.shape[1])
    faiss.copy_array_to_vector(torch.cat(codebooks).numpy().ravel(), quantizer.codebooks)
    quantizer.is_trained = True
    bits = faiss.vector_to_array(quantizer.nbits).astype(np.int64)

    def codes() -> Tensor:
        return torch.from_numpy(faiss.unpack_bitstrings(quantizer.compute_codes(x.numpy()), bits).astype(np.int64))

    return codes


def _faiss_codebooks(faiss: ModuleType, x: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """Fair: as many iterations as ours, from random rows and on at most 256 rows a code, which are its defaults: both
    save time and cost no more than a hundredth of the error."""
    quantizer = _faiss_quantizer(faiss, sizes, x.shape[1])
    quantizer.train_type = faiss.ResidualQuantizer.Train_default
    quantizer.cp.niter = ITERATIONS
    quantizer.train(x.numpy())
    codebooks = torch.from_numpy(faiss.vector_to_array(quantizer.codebooks))
    return list(codebooks.view(-1, x.shape[1]).split(list(sizes)))


def _faiss_quantizer(faiss: ModuleType, sizes: Sequence[int], dim: int) -> Any:
    """For sizes that are powers of two."""
    bits = faiss.UInt64Vector()
    for size in sizes:
        bits.push_back(size.bit_length() - 1)
    quantizer = faiss.ResidualQuantizer(dim, bits)
    quantizer.max_beam_size = 1
    return quantizer


def _mini_batches(cluster: ModuleType, x: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """Fair: of seeds and batch sizes, quick ones that end about as well as whole passes, and it stops when nothing more
    is gained; what a level leaves over is found by the fastest search there is, ours."""
    codebooks: list[Tensor] = []
    for size in sizes:
        rest = x - rq_nearest(x, codebooks)[1] if codebooks else x
        kmeans = cluster.MiniBatchKMeans(size, init="random", n_init=1, batch_size=4096, random_state=0)
        codebooks.append(torch.from_numpy(kmeans.fit(rest.numpy()).cluster_centers_))
    return codebooks
