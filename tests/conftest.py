"""Shared by all tests: uninitialised memory is NaN, GENREC_TEST_DEVICE says where the kernel tests run, and one small
trained run serves all that comes after training."""

import contextlib
import io
import os

import pytest
import torch
from hypothesis import settings

settings.register_profile("genrec", deadline=None)  # speed is measured in bench/, never here
settings.load_profile("genrec")

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read by triton when a kernel is defined, whichever test comes first


@pytest.fixture(scope="session", autouse=True)
def poisoned_memory():
    """torch.empty and its relatives return NaN (integers: the largest value): who reads them by mistake is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the kernel tests run."""
    return torch.device(os.environ.get("GENREC_TEST_DEVICE", "cpu"))


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A directory with features/, tokenizer/ and model/, as the demo lays them out."""
    import small  # the kernels are tested where nothing above them is installed

    from genrec.cli import main

    directory = tmp_path_factory.mktemp("trained")
    features, ids = small.write_inputs(directory)
    settings = {"features": features, "semantic_ids": ids, "out": directory / "model", **small.TINY_RUN}
    with contextlib.redirect_stderr(io.StringIO()):
        assert main(["train", *(str(word) for key, value in settings.items() for word in (f"--{key}", value))]) == 0
    return directory
