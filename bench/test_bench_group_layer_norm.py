"""Group layer norm against the two ways to write it in PyTorch, eager and compiled: layer_norm and a gathered affine,
and a layer_norm of its own for every group.

Bytes are those of x, y and the residual, forward; of the gradients too, backward. The affine stays in cache; x does
not, for every call has another.
"""

import pytest
import torch

from bench.peers.group_layer_norm import fused, gathered, group_by_group
from bench.race import passes
from bench.sizes import sizes
from genrec.kernels import group_layer_norm

GROUPS = 4


@pytest.fixture
def group_ids():
    generator = torch.Generator(torch.get_default_device()).manual_seed(0)
    return lambda n: torch.randint(0, GROUPS, (n,), generator=generator)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "with_backward"])
@pytest.mark.parametrize(
    ("n", "d"),
    sizes([(64, 64)], [(8192, 64), (8192, 256), (32768, 256), (8192, 1024)], [(32768, 128), (32768, 1024)]),
)
def test_norm(race, compiled, randn, group_ids, n, d, backward):
    inputs, ids = [randn(n, d), randn(GROUPS, d), randn(GROUPS, d)], group_ids(n)
    forms = {
        "genrec": lambda x, weight, bias: group_layer_norm(x, ids, weight, bias),
        "gathered": lambda x, weight, bias: gathered(x, weight, bias, ids),
        **compiled("gathered, compiled", lambda x, weight, bias: gathered(x, weight, bias, ids)),
        **compiled("gathered, dynamic", lambda x, weight, bias: gathered(x, weight, bias, ids), dynamic=True),
        "group by group": lambda x, weight, bias: group_by_group(x, weight, bias, ids),
    }
    for name, form in fused(backward).items():
        forms[name] = lambda x, weight, bias, form=form: form(x, weight, bias, ids)
    race(
        f"group norm {n}×{d}{' with backward' * backward}", passes(forms, inputs, backward, rotated=True),
        flops=(20 if backward else 7) * n * d, bytes=(5 if backward else 2) * inputs[0].nbytes,
        goal=2.0 if backward else 3.0, along=(f"norm of {n} rows{' with backward' * backward}", "width", d),
    )  # fmt: skip


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "with_backward"])
@pytest.mark.parametrize(("n", "d"), sizes([(64, 64)], [(8192, 64), (32768, 256)]))
def test_add_and_norm(race, compiled, randn, group_ids, n, d, backward):
    """A residual block's end: s = x + branch and norm(s), both used."""
    inputs, ids = [randn(n, d), randn(n, d), randn(GROUPS, d), randn(GROUPS, d)], group_ids(n)

    def plain(x, branch, weight, bias):
        s = x + branch
        return gathered(s, weight, bias, ids), s

    forms = {
        "genrec": lambda x, branch, weight, bias: group_layer_norm(x, ids, weight, bias, residual=branch),
        "gathered": plain,
        **compiled("gathered, compiled", plain),
        **compiled("gathered, dynamic", plain, dynamic=True),
    }
    race(
        f"add and group norm {n}×{d}{' with backward' * backward}", passes(forms, inputs, backward, rotated=True),
        flops=(22 if backward else 8) * n * d, bytes=(8 if backward else 4) * inputs[0].nbytes,
        goal=2.0 if backward else 3.0,
    )  # fmt: skip
