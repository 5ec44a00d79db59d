"""Launch tables and launching."""

import contextlib

import pytest
import torch

from genrec.kernels import launch
from genrec.kernels.launch import Table, Target

ROWS = """kernel,arch,dtype,dim,rows,BLOCK,WIDTH,num_warps,num_stages,maxnreg
forward,80,*,64,,16,8,4,3,
forward,80,*,128,,32,,8,2,
forward,90,fp16,64,,64,,4,3,
forward,100,*,64,,128,,4,,128
tiles,80,*,64,16,1,,4,,
tiles,80,*,64,32,2,,4,,
tiles,80,*,128,16,3,,4,,
twice,80,*,64,,1,,4,,
twice,80,fp16,64,,2,,4,,
"""


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "launch.csv"
    path.write_text(ROWS)
    return Table(path)


class Kernel:
    """Remembers its launches."""

    def __init__(self):
        self.calls = []

    def __getitem__(self, grid):
        return lambda *args, **constants: self.calls.append((grid, args, constants))


def block(table, arch, dtype, kernel="forward", **sizes):
    return launch.launch_of(table.row(kernel, arch, dtype, sizes))["BLOCK"]


@pytest.mark.parametrize(
    ("arch", "dtype", "dim", "expected"),
    [
        (80, "fp16", 64, 16),
        (80, "fp16", 1, 16),
        (80, "fp16", 65, 32),
        (80, "fp16", 1000, 32),  # beyond the last row
        (89, "fp16", 64, 16),
        (90, "fp16", 128, 64),  # an architecture's rows replace all older ones of the dtype
        (90, "bf16", 64, 16),
        (120, "fp16", 64, 128),
        (75, "fp16", 64, 16),  # older than every row
    ],
)
def test_a_row_serves_later_architectures_and_sizes_up_to_its_own(table, arch, dtype, dim, expected):
    assert block(table, arch, dtype, dim=dim) == expected


def test_sizes_are_looked_up_one_after_the_other(table):
    found = [block(table, 80, "fp32", "tiles", dim=dim, rows=rows) for dim in (64, 65) for rows in (1, 17, 99)]
    assert found == [1, 2, 2, 3, 3, 3]


@pytest.mark.parametrize(("kernel", "count"), [("none", 0), ("twice", 2)])
def test_a_launch_without_exactly_one_row_is_a_sentence(table, kernel, count):
    with pytest.raises(LookupError, match=rf"{count} launches of {kernel} for sm_80, fp16, {{}}; expected one"):
        table.row(kernel, 80, "fp16", {})


def test_constants_and_options_are_what_a_launch_gets(table):
    x = torch.empty(0)
    assert table.config("forward", x, dim=64) == {"BLOCK": 16, "WIDTH": 8, "num_warps": 4, "num_stages": 3}
    assert table.config("forward", x, dim=128) == {"BLOCK": 32, "num_warps": 8, "num_stages": 2}
    assert table.config("forward", x, dim=64) is table.config("forward", x, dim=64)  # looked up once


def test_a_target_takes_the_place_of_the_device(table, monkeypatch):
    x, kernel, recorded = torch.empty(3, device="meta"), Kernel(), []
    assert launch.architecture(x.device) == launch.INTERPRETED
    assert table.config("forward", x, dim=64)["BLOCK"] == 16
    monkeypatch.setattr(launch, "target", Target(120, lambda *launched: recorded.append(launched)))
    assert launch.architecture(x.device) == 120
    assert table.config("forward", x, dim=64) == {"BLOCK": 128, "num_warps": 4, "maxnreg": 128}
    launch.launch(kernel, (0,), x, 7, BLOCK=128)
    assert recorded == [(kernel, (0,), (x, 7), {"BLOCK": 128})]  # compiled also where there is nothing to do
    assert not kernel.calls


def test_an_empty_grid_launches_nothing():
    x, kernel = torch.empty(3), Kernel()
    launch.launch(kernel, (2, 0), x, BLOCK=1)
    assert kernel.calls == []
    launch.launch(kernel, (2, 1), None, x, 5, BLOCK=1)
    assert kernel.calls == [((2, 1), (None, x, 5), {"BLOCK": 1})]


def test_a_kernel_runs_on_the_device_of_its_tensors(monkeypatch):
    entered, kernel = [], Kernel()

    @contextlib.contextmanager
    def device(index):
        entered.append(index)
        yield

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", device)
    for index in (0, 1):
        monkeypatch.setattr(torch.Tensor, "get_device", lambda x, index=index: index)
        launch.launch(kernel, (1,), torch.empty(3))
    assert entered == [1]
    assert len(kernel.calls) == 2


def test_a_launch_needs_a_tensor():
    with pytest.raises(TypeError, match="launched without a tensor"):
        launch.launch(Kernel(), (1,), 1, 2)
