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
    places: Tensor  # (N + 1, 2) int64, item index → the node above its leaf (-1 for item 0) and which child of it it is

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
        parent = np.repeat(np.arange(len(first_child) - 1), np.diff(first_child))  # of every leaf
        places = np.stack([parent, np.arange(len(rows)) - first_child[parent]], 1)
        self._keep("places", np.concatenate([[[-1, 0]], places[np.argsort(order)]]))

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
        0 elsewhere. Of beams that share a node the first is marked; the others are dead, for a beam's path is its own.
        """
        (requests, beams), width = nodes.shape, self.max_children[-1]
        parent, child = F.embedding(items, self.places).unbind(-1)
        beam = _first_places(nodes, parent, len(self.get_buffer(f"children{self.levels - 1}")))
        penalty = torch.zeros(requests, (beams + 1) * width, device=nodes.device)  # the last beam takes what is in none
        return penalty.scatter(1, beam * width + child, -math.inf).view(requests, beams + 1, width)[:, :beams]


def _first_places(row: Tensor, wanted: Tensor, bound: int) -> Tensor:
    """row (B, W) of numbers 0 … bound - 1, wanted (B, X) → (B, X): the first place of a row that holds the number, W
    where none does. By search in what is sorted, for comparing all with all is slow where X is thousands."""
    width = row.shape[1]
    keys = (row * width + torch.arange(width, device=row.device)).sort(1)[0]  # by number, then by place
    least = wanted * width
    found = F.pad(keys, (0, 1), value=bound * width).gather(1, torch.searchsorted(keys, least))
    return (found - least).clamp(max=width)


def take(table: Tensor, index: Tensor) -> Tensor:
    """table (N,) → table[index], of index's shape. An export makes a Gather of this and a GatherND of table[index]."""
    return table.index_select(0, index.flatten()).view(index.shape)


def _begins(prefixes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Rows at which a prefix differs from the one before; prefixes are sorted."""
    new = np.ones(len(prefixes), bool)
    new[1:] = (prefixes[1:] != prefixes[:-1]).any(1)
    return np.flatnonzero(new)
