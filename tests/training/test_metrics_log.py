"""metrics.jsonl: what an interrupted run must forget, and what it must keep."""

import json

import pytest

from genrec.training.log import MetricsLog, read_metrics

ROWS = [
    ("pretrain", 0),
    ("pretrain", 1),
    ("pretrain", 2),
    ("finetune", 0),
    ("finetune", 1),
    ("finetune", 2),
    ("finetune", 3),
]


@pytest.fixture
def directory(tmp_path):
    with MetricsLog(tmp_path) as log:
        for stage, step in ROWS:
            log.write(stage, step, loss=step / 3, expert_load=[0.25, 0.75])
    return tmp_path


def kept(directory):
    return [(row["stage"], row["step"]) for row in read_metrics(directory / "metrics.jsonl")]


def test_lines_are_json_objects_with_exact_numbers(directory):
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["loss"] for line in lines] == [step / 3 for _, step in ROWS]
    assert json.loads(lines[0]) == {"stage": "pretrain", "step": 0, "loss": 0.0, "expert_load": [0.25, 0.75]}
    assert list((directory / "tensorboard").iterdir())


@pytest.mark.parametrize(("step", "left"), [(0, 3), (1, 5), (2, 6), (9, 7)])
def test_rewind_keeps_other_stages_and_what_came_before(directory, step, left):
    """At step 0 a stage starts over, its first validation included; later on that validation is kept."""
    with MetricsLog(directory) as log:
        log.rewind("finetune", step)
        assert kept(directory) == ROWS[:left]
        log.write("finetune", step + 1, loss=1.0)
    assert kept(directory) == [*ROWS[:left], ("finetune", step + 1)]


def test_rewind_forgets_half_a_line(directory):
    path = directory / "metrics.jsonl"
    whole = path.read_text()
    path.write_text(whole + '{"stage": "finetune", "step": 4, "lo')
    assert kept(directory) == ROWS
    with MetricsLog(directory) as log:
        log.rewind("finetune", 3)
        log.write("finetune", 4, loss=0.5)
    assert path.read_text() == whole + '{"stage": "finetune", "step": 4, "loss": 0.5}\n'


def test_rewind_of_an_unknown_stage_changes_nothing(directory):
    before = (directory / "metrics.jsonl").read_bytes()
    with MetricsLog(directory) as log:
        log.rewind("align", 0)
    assert (directory / "metrics.jsonl").read_bytes() == before
