"""What the launches of ReLU attention share: one form of the arguments, for dense and for packed tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from genrec.kernels.launch import Table
from genrec.kernels.relu_attention.padded import Options

TABLE = Table(Path(__file__).with_name("launch.csv"))
WIDEST = 256  # largest D and Dv that the kernels hold on chip


class Call(NamedTuple):
    """The arguments of an operator; tensors have a contiguous last dimension."""

    q: Tensor  # (B, H, Lq, D), or (Tq, H, D) where packed
    k: Tensor
    v: Tensor
    cu_q: Tensor | None  # None unless packed
    cu_k: Tensor | None
    batch: int
    length_q: int  # of the longest sequence
    length_k: int
    limit: Tensor | None  # (B, Lq), or (Tq,) where packed
    rel_bias: Tensor | None
    divisors: Tensor | None
    causal: bool
    scale: float
    divisor: float
    visible: bool

    @property
    def is_packed(self) -> bool:
        return self.cu_q is not None

    @property
    def heads(self) -> int:
        return self.q.shape[1]

    @property
    def buckets(self) -> int:
        """Number of distances that have a bias of their own."""
        return 0 if self.rel_bias is None else self.rel_bias.shape[1]

    def strides(self, *tensors: Tensor) -> list[int]:
        """Of the batch, the head and the row of each tensor; the batch of packed tensors has none."""
        if not self.is_packed:
            return [stride for x in tensors for stride in x.stride()[:3]]
        return [stride for x in tensors for stride in (0, x.stride(1), x.stride(0))]

    def limit_strides(self) -> tuple[int, int]:
        """Of the batch and the row of key_limit."""
        if self.limit is None:
            return 0, 0
        return (0, self.limit.stride(0)) if self.is_packed else (self.limit.stride(0), self.limit.stride(1))

    @property
    def form(self) -> str:
        """Ending of the names of launches for short sequences, "" for others; packed sequences take one form."""
        return "" if self.is_packed or max(self.length_q, self.length_k) > 16 else "_16"

    def constants(self, name: str) -> dict[str, Any]:
        """What a kernel is compiled for: its row of the launch table, and what the call fixes."""
        dim, dim_v = self.q.shape[-1], self.v.shape[-1]
        tile = dict(TABLE.config(name, self.q, dim=max(dim, dim_v)))
        if "num_stages" in tile:
            tile["STAGES"] = tile[
                "num_stages"
            ]  # of the loop that carries the sums, whether it can be seen to multiply or not
        widest = tile.pop("CHUNK", WIDEST)
        chunks = {"CHUNK": min(widest, _power_of_two(dim)), "CHUNK_V": min(widest, _power_of_two(dim_v))}
        return {"CAUSAL": self.causal, "VISIBLE": self.visible, "DIM": dim, "DIM_V": dim_v, **chunks, **tile}


def dense(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> Call:
    return _call(q, k, v, None, None, q.shape[0], q.shape[2], k.shape[2], Options(*options))


def packed(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, *options: Any
) -> Call:  # fmt: skip
    offsets = cu_q.contiguous(), cu_k.contiguous()
    return _call(q, k, v, *offsets, cu_q.shape[0] - 1, max_q, max_k, Options(*options))


def _call(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor | None, cu_k: Tensor | None, batch: int, length_q: int, length_k: int,
    options: Options,
) -> Call:  # fmt: skip
    tensors = along_rows(q), along_rows(k), along_rows(v)
    rel_bias, divisors = (None if x is None else x.contiguous() for x in (options.rel_bias, options.divisors))
    return Call(
        *tensors, cu_q, cu_k, batch, length_q, length_k, options.key_limit, rel_bias, divisors,
        options.causal, options.scale, options.divisor, options.visible,
    )  # fmt: skip


def along_rows(x: Tensor) -> Tensor:
    """x with a contiguous last dimension, a copy if need be.

    Other layouts are rare, and loads that are not vectors would cost a kernel more than the copy does.
    """
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def fits(q: Tensor, v: Tensor) -> bool:
    return max(q.shape[-1], v.shape[-1]) <= WIDEST


def _power_of_two(dim: int) -> int:
    """Columns of a tile that holds dim: a power of two, and at least what a tensor core takes."""
    return max(16, 1 << max(dim - 1, 0).bit_length())
