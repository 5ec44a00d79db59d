"""The processes of one run: who they are, and how they agree. Alone, all of it is the identity."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


class FirstRankFailed(SystemExit):
    """The first rank failed and said why; the others leave without a word."""


@dataclass(frozen=True)
class Ranks:
    """One process among `world` that train one model; rank 0 writes the files and speaks to the user."""

    rank: int = 0
    world: int = 1
    device: str = "cpu"

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes and speaks."""
        return self.rank == 0

    def on_first(self, work: Callable[[], T]) -> T:
        """Run `work` on the first rank alone and hand its result to all; if it fails, all stop."""
        if self.world == 1:
            return work()
        outcome: list[Any] = [None, None]
        error: BaseException | None = None
        if self.first:
            try:
                outcome = [True, work()]
            except BaseException as failure:
                error = failure
        dist.broadcast_object_list(outcome, src=0, device=torch.device(self.device))
        if error is not None:
            raise error
        if not outcome[0]:
            raise FirstRankFailed(2)
        return outcome[1]

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all ranks, in place."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def gather(self, value: T) -> list[T]:
        """What every rank has, in their order; a value is anything that pickles."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values


@contextmanager
def joined(device: str, always: bool = False) -> Iterator[Ranks]:
    """The ranks that torchrun or deepspeed started, by the environment variables both of them set.

    always: a process group also for a single process, which DeepSpeed asks for.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1 and not always:
        yield Ranks(device=device)
        return
    rank, local = int(os.environ.get("RANK", "0")), int(os.environ.setdefault("LOCAL_RANK", "0"))
    if device == "cuda":
        torch.cuda.set_device(local)
        device = f"cuda:{local}"
    backend = "nccl" if device.startswith("cuda") else "gloo"
    store = dist.HashStore() if world == 1 else None  # otherwise where MASTER_ADDR and MASTER_PORT say
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timedelta(minutes=30))
    try:
        yield Ranks(rank, world, device)
    finally:
        dist.destroy_process_group()
