"""The catalogue as a trie of semantic ids in compressed sparse rows: what a beam may say next."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from genrec.interfaces import SemanticIds


class Trie:
    """Nodes of a level are numbered in lexicographic order of their codes, so the children of a node are consecutive.

    Level 0 is the root, level `levels` the leaves; leaf i is item `items[i]`.
    """

    def __init__(self, semantic_ids: SemanticIds, device: torch.device | str = "cpu") -> None:
        codes = semantic_ids.codes[1:]
        if len(codes) == 0:
            raise ValueError("semantic_ids holds no items; expected at least one")
        order = np.lexsort(codes.T[::-1])
        rows = codes[order]
        self.levels = rows.shape[1]
        self.items = torch.from_numpy(order + 1).to(device)  # (N,) leaf → item index
        # per level, (nodes + 1,): the children of node i are first_child[i] … first_child[i + 1] - 1
        self.first_child: list[Tensor] = []
        self.code: list[Tensor] = []  # per level, (nodes of the level below,): the code that leads to that child
        self.max_children: list[int] = []
        parents = np.zeros(1, np.int64)  # the row at which every node of the level above begins; the root begins at 0
        for level in range(self.levels):
            begins = _begins(rows[:, : level + 1])
            first_child = np.append(np.searchsorted(begins, parents), len(begins))
            self.first_child.append(torch.from_numpy(first_child).to(device))
            self.code.append(torch.from_numpy(rows[begins, level].astype(np.int64)).to(device))
            self.max_children.append(int(np.diff(first_child).max()))
            parents = begins
        if len(parents) != len(rows):
            raise ValueError("two items share one semantic id; expected every item to have its own")

    def expand(self, level: int, nodes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """nodes (B, W) of `level` → children (B, W, C), the code that leads to each, and whether it exists.

        C is the largest number of children at this level; where a child does not exist its number is still a valid one.
        """
        offsets, codes = self.first_child[level], self.code[level]
        children = offsets[nodes].unsqueeze(-1) + torch.arange(self.max_children[level], device=nodes.device)
        alive = children < offsets[nodes + 1].unsqueeze(-1)
        children = children.clamp(max=len(codes) - 1)
        return children, codes[children], alive


def _begins(prefixes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Rows at which a prefix differs from the one before; prefixes are sorted."""
    new = np.ones(len(prefixes), bool)
    new[1:] = (prefixes[1:] != prefixes[:-1]).any(1)
    return np.flatnonzero(new)
