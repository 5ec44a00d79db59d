"""One small trained run for the commands that come after training."""

import contextlib
import io

import pytest
import small

from genrec.cli import main


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A directory with features/, tokenizer/ and model/, as the demo lays them out."""
    directory = tmp_path_factory.mktemp("trained")
    features, ids = small.write_inputs(directory)
    settings = {"features": features, "semantic_ids": ids, "out": directory / "model", **small.TINY_RUN}
    with contextlib.redirect_stderr(io.StringIO()):
        assert main(["train", *(str(word) for key, value in settings.items() for word in (f"--{key}", value))]) == 0
    return directory


@pytest.fixture
def refused(capsys):
    """refused(argv, code, words …): one line on stderr after whatever progress came before, and no traceback."""

    def check(argv, code, *words):
        assert main(argv) == code
        err = capsys.readouterr().err
        assert "Traceback" not in err
        last = err.splitlines()[-1]
        assert last.startswith(f"genrec {argv[0]}: error: ")
        for word in words:
            assert word in last
        return last

    return check
