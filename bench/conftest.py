"""A speed is reported only where the result is right: every benchmark checks its operator first."""

import pytest
import torch

THREADS = 1


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Figures of a shared machine are comparable on one thread only."""
    torch.set_num_threads(THREADS)


@pytest.fixture
def randn():
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(shape, generator=generator)
