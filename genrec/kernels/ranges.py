"""Named ranges around operators, steps and stages, in the NVTX domain "genrec", with shapes as their payload.

Nsight draws them; so does whatever else is in `SINKS`, as genrec.profiling does. While nobody listens a range is one
look at an empty list.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Any, Protocol

import numpy as np
import nvtx
import torch
from torch import Tensor

Values = Mapping[str, Any]  # of a range: shapes of tensors, lists of shapes, integers
NOTHING: AbstractContextManager[None] = nullcontext()


class Sink(Protocol):
    """Whoever wants to know of ranges; they are properly nested within a thread."""

    def push(self, name: str, values: Values) -> None: ...

    def pop(self) -> None: ...


SINKS: list[Sink] = []


def span(name: str, **values: Any) -> AbstractContextManager[None]:
    """The range `name` around a block. Tensors among `values` stand for their shapes; what is None is left out."""
    if not SINKS or torch.compiler.is_compiling():
        return NOTHING
    return _Span(name, {key: _shape(value) for key, value in values.items() if value is not None})


class _Span(AbstractContextManager[None]):
    def __init__(self, name: str, values: Values) -> None:
        self.name, self.values, self.sinks = name, values, tuple(SINKS)

    def __enter__(self) -> None:
        for sink in self.sinks:
            sink.push(self.name, self.values)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for sink in reversed(self.sinks):
            sink.pop()


def _shape(value: Any) -> Any:
    if isinstance(value, Tensor):
        return tuple(value.shape)
    return [_shape(one) for one in value] if isinstance(value, Sequence) else value


class Nvtx:
    """Ranges as a profiler that listens to NVTX sees them; every payload has a schema with the names of its values."""

    def __init__(self, domain: nvtx.Domain) -> None:
        self.domain = domain

    def push(self, name: str, values: Values) -> None:
        arrays = {key: np.asarray(value, np.int64) for key, value in values.items()}
        arrays = {key: array for key, array in arrays.items() if array.size}  # no shape of a number
        payload = None
        if arrays:
            payload = np.zeros((), np.dtype([(key, np.int64, array.shape) for key, array in arrays.items()]))
            for key, array in arrays.items():
                payload[key] = array
        self.domain.push_range(self.domain.get_event_attributes(name, payload=payload))

    def pop(self) -> None:
        self.domain.pop_range()


_DOMAIN = nvtx.get_domain("genrec")
if isinstance(_DOMAIN, nvtx.Domain):  # nvtx gives another where no profiler is attached
    SINKS.append(Nvtx(_DOMAIN))
