"""Parameters of benchmark cases, by the --bench-size from which on they run."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def sizes(smoke: Iterable[Any], default: Iterable[Any] = (), full: Iterable[Any] = ()) -> list[Any]:
    """For pytest.mark.parametrize: a value, or a tuple of values, per case."""
    groups = {"smoke": smoke, "default": default, "full": full}
    return [
        pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.size(name))
        for name, cases in groups.items()
        for case in cases
    ]
