"""The catalogue as a trie of semantic ids in compressed sparse rows: what a beam may say next."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from genrec.interfaces import SemanticIds


class Trie(nn.Module):
    """Nodes of a level are numbered in lexicographic order of their codes, so the children of a node are consecutive.

    Level 0 is the root, level `levels` the leaves; leaf i is item `items[i]`. All of it is buffers that no state_dict
    holds, for it follows from the semantic ids.
    """

    items: Tensor  # (N,) int64, leaf → item index
    leaves: Tensor  # (N + 1,) int64, item index → leaf, -1 for item 0

    def __init__(self, semantic_ids: SemanticIds) -> None:
        super().__init__()
        codes = semantic_ids.codes[1:]
        if len(codes) == 0:
            raise ValueError("semantic_ids holds no items; expected at least one")
        order = np.lexsort(codes.T[::-1])
        rows = codes[order]
        self.levels = rows.shape[1]
        self.nodes: list[int] = []  # per level, without the root
        self.max_children: list[int] = []
        parents = np.zeros(1, np.int64)  # the row at which every node of the level above begins; the root begins at 0
        for level in range(self.levels):
            begins = _begins(rows[:, : level + 1])
            first_child = np.append(np.searchsorted(begins, parents), len(begins))
            # (nodes above, 2): the children of node i are children[i, 0] … children[i, 1] - 1; one gather reads both
            self._keep(f"children{level}", np.stack([first_child[:-1], first_child[1:]], 1))
            self._keep(f"codes{level}", rows[begins, level])  # (nodes,) the code that leads to each node
            self.nodes.append(len(begins))
            self.max_children.append(int(np.diff(first_child).max()))
            parents = begins
        if len(parents) != len(rows):
            raise ValueError("two items share one semantic id; expected every item to have its own")
        self._keep("items", order + 1)
        self._keep("leaves", np.concatenate([[-1], np.argsort(order)]))

    def _keep(self, name: str, values: NDArray[np.int64]) -> None:
        self.register_buffer(name, torch.from_numpy(values.astype(np.int64)), persistent=False)

    def expand(self, level: int, nodes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """nodes (B, W) of `level` → children (B, W, C), the code that leads to each, and whether it exists.

        C is the largest number of children at this level; where a child does not exist its number is still a valid one.
        """
        ends = F.embedding(nodes, self.get_buffer(f"children{level}"))
        children = ends[..., :1] + torch.arange(self.max_children[level], device=nodes.device)
        alive = children < ends[..., 1:]
        children = children.clamp(max=self.nodes[level] - 1)
        return children, take(self.get_buffer(f"codes{level}"), children), alive

    def exclude(self, nodes: Tensor, items: Tensor) -> Tensor:
        """nodes (B, W) above the leaves, items (B, X) → (B, W, C) float32: -inf where the child is one of these items,
        0 elsewhere. An item is a child of one node, at a place that its leaf tells, so nothing is searched."""
        width, level = self.max_children[-1], self.levels - 1
        first = F.embedding(nodes, self.get_buffer(f"children{level}"))[..., :1]
        place = (take(self.leaves, items)[:, None] - (first - 1)).clamp(0, width + 1)  # (B, W, X), both ends: elsewhere
        penalty = torch.zeros(*nodes.shape, width + 2, device=nodes.device)
        return penalty.scatter(2, place, -math.inf)[..., 1 : width + 1]


def take(table: Tensor, index: Tensor) -> Tensor:
    """table (N,) → table[index], of index's shape. An export makes a Gather of this and a GatherND of table[index]."""
    return table.index_select(0, index.flatten()).view(index.shape)


def _begins(prefixes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Rows at which a prefix differs from the one before; prefixes are sorted."""
    new = np.ones(len(prefixes), bool)
    new[1:] = (prefixes[1:] != prefixes[:-1]).any(1)
    return np.flatnonzero(new)
