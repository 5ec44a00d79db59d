"""How a command that refuses is checked."""

import pytest

from genrec.cli import main


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
