"""A small slice of the shipped log, ready for genrec train, and a command line that takes seconds."""

import pytest
import small


@pytest.fixture(scope="session")
def inputs(tmp_path_factory):
    """(features, semantic ids) directories."""
    return small.write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="session")
def arguments(inputs):
    """arguments(out, key=value, …) → the command line of a tiny run; keys with dots are written with __."""

    def build(out, **changes):
        values = small.TINY_RUN | {key.replace("__", "."): value for key, value in changes.items()}
        settings = {"features": inputs[0], "semantic_ids": inputs[1], "out": out, **values}
        return ["train", *(str(word) for key, value in settings.items() for word in (f"--{key}", value))]

    return build
