# mypy: allow-untyped-defs
"""The (token, slot) pairs in the order of their experts, and the way from a tile of rows to its expert: on the device,
without a host synchronisation or a shape that depends on data.

Pair p = token · k + slot. A counting sort in integers, so stable and deterministic without atomics on global memory:
  1. count: one program per block of pairs writes how many of them each expert gets;
  2. order: one program per block sums these counts over all blocks (the experts' offsets) and over the earlier ones
     (where its own pairs begin), then ranks its pairs among equals, chunk by chunk, and scatters them.
Up to one block of pairs, as in decoding, needs only the second. The histogram belongs here and not in the routing: that
is an operator of its own, and indices may come from anywhere.

A pair whose index lies outside [0, E) gets no row; whoever combines a token's rows gives NaN for it.

The grouped products run a fixed grid, cdiv(T·k, BLOCK_M) + E tiles of rows, enough for any distribution over the
experts. Each program finds its tile from the offsets; those past the last tile return. T·k must stay below 2³¹.
"""

from __future__ import annotations

from pathlib import Path

import torch
import triton
import triton.language as tl
from torch import Tensor

from genrec.kernels.launch import Table, launch

TABLE = Table(Path(__file__).with_name("launch.csv"))


@triton.jit
def expert_of(indices, pair, pairs, experts, top_k, stride_it, stride_ik):
    """The expert of every pair, -1 where there is none."""
    place = (pair // top_k).to(tl.int64) * stride_it + (pair % top_k).to(tl.int64) * stride_ik
    index = tl.load(indices + place, mask=pair < pairs, other=-1)
    return tl.where((index >= 0) & (index < experts), index, -1).to(tl.int32)


@triton.jit
def count_block(
    indices, block, pairs, experts, top_k, stride_it, stride_ik, BLOCK: tl.constexpr, EXPERTS: tl.constexpr
):
    """(EXPERTS,) how many pairs of a block each expert gets."""
    pair = block * BLOCK + tl.arange(0, BLOCK)
    expert = expert_of(indices, pair, pairs, experts, top_k, stride_it, stride_ik)
    return tl.histogram(tl.maximum(expert, 0), EXPERTS, mask=expert >= 0)


@triton.jit(do_not_specialize=["pairs"])
def count_kernel(
    indices, counts, pairs, experts, top_k, stride_it, stride_ik,
    BLOCK: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    count = count_block(indices, block, pairs, experts, top_k, stride_it, stride_ik, BLOCK, EXPERTS)
    tl.store(counts + block.to(tl.int64) * EXPERTS + tl.arange(0, EXPERTS), count)


@triton.jit(do_not_specialize=["pairs", "blocks"])
def order_kernel(
    indices, counts, order, offsets, pairs, blocks, experts, top_k, stride_it, stride_ik,
    ALONE: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    block, expert, chunk = tl.program_id(0), tl.arange(0, EXPERTS), tl.arange(0, CHUNK)
    before = tl.zeros((EXPERTS,), tl.int32)
    if ALONE:
        total = count_block(indices, block, pairs, experts, top_k, stride_it, stride_ik, BLOCK, EXPERTS)
    else:
        total = tl.zeros((EXPERTS,), tl.int32)
        for first in range(0, blocks, CHUNK):
            other = (first + chunk)[:, None]
            place = other.to(tl.int64) * EXPERTS + expert[None, :]
            count = tl.load(counts + place, mask=other < blocks, other=0)
            total += tl.sum(count, 0)
            before += tl.sum(tl.where(other < block, count, 0), 0)
    end = tl.cumsum(total, 0)
    if block == 0:
        tl.store(offsets, 0)
        tl.store(offsets + 1 + expert, end, mask=expert < experts)

    row = end - total + before  # of the next pair of each expert
    for first in range(0, BLOCK, CHUNK):
        pair = block * BLOCK + first + chunk
        mine = expert_of(indices, pair, pairs, experts, top_k, stride_it, stride_ik)
        hit = (mine[:, None] == expert[None, :]).to(tl.int32)
        rank = tl.cumsum(hit, 0) - hit
        place = tl.sum(hit * (row[None, :] + rank), 1)
        tl.store(order + place, pair, mask=mine >= 0)
        row += tl.sum(hit, 0)


@triton.jit
def find_tile(offsets, tile, experts, BLOCK_M: tl.constexpr, EXPERTS: tl.constexpr):
    """The expert of a tile of rows, and its number among that expert's tiles; past the last tile an expert ≥ E."""
    expert = tl.arange(0, EXPERTS)
    begin = tl.load(offsets + expert, mask=expert < experts, other=0)
    end = tl.load(offsets + 1 + expert, mask=expert < experts, other=0)
    tiles = tl.cdiv(end - begin, BLOCK_M)
    earlier = tl.cumsum(tiles, 0) <= tile
    return tl.sum(earlier.to(tl.int32), 0), tile - tl.sum(tl.where(earlier, tiles, 0), 0)


@triton.jit
def swizzle(program, rows, columns, GROUP: tl.constexpr):
    """(row, column) of a program: down GROUP rows first, then the next column, so neighbours share operands in L2."""
    first = program // (GROUP * columns) * GROUP
    height = tl.minimum(rows - first, GROUP)
    within = program % (GROUP * columns)
    return first + within % height, within // height


class Order:
    """The pairs of `indices` sorted by expert."""

    def __init__(self, indices: Tensor, experts: int, x: Tensor) -> None:
        self.experts, self.top_k, self.pairs = experts, max(indices.shape[1], 1), indices.numel()
        self.width = max(triton.next_power_of_2(experts), 16)
        self.order = indices.new_empty(self.pairs, dtype=torch.int32)  # pair of every row
        self.offsets = indices.new_empty(experts + 1, dtype=torch.int32)  # first row of every expert, then the end
        config = TABLE.config("order", x, experts=self.width)
        blocks = max(triton.cdiv(self.pairs, config["BLOCK"]), 1)
        counts = indices.new_empty((blocks, self.width), dtype=torch.int32)
        shape = (experts, self.top_k, *indices.stride())
        if blocks > 1:
            launch(
                count_kernel, (blocks,), indices, counts, self.pairs, *shape,
                BLOCK=config["BLOCK"], EXPERTS=self.width, num_warps=config["num_warps"],
            )  # fmt: skip
        launch(
            order_kernel, (blocks,), indices, counts, self.order, self.offsets, self.pairs, blocks, *shape,
            ALONE=blocks == 1, EXPERTS=self.width, **config,
        )  # fmt: skip

    def tiles(self, block: int) -> int:
        """Enough tiles of `block` rows for any distribution of the pairs over the experts."""
        return min(triton.cdiv(self.pairs, block) + self.experts, self.pairs)

    @property
    def rows(self) -> int:
        """The shape class of the launch table: rows per expert, rounded up to a power of two."""
        return triton.next_power_of_2(max(triton.cdiv(self.pairs, max(self.experts, 1)), 1))
