"""The item head's loss against PyTorch's own, in value and gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from genrec.models.ugt import losses
from genrec.models.ugt.losses import linear_cross_entropy

SHAPES = st.tuples(st.integers(1, 40), st.integers(1, 12), st.integers(1, 30), st.integers(1, 64))


def inputs(rows, width, vocabulary, dtype=torch.float32):
    generator = torch.Generator().manual_seed(rows * 1000 + width * 100 + vocabulary)
    x, weight, bias = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((rows, width), (vocabulary, width), (vocabulary,))
    )
    targets = torch.randint(vocabulary, (rows,), generator=generator)
    return [t.to(dtype).requires_grad_() for t in (x, weight, bias)], targets


def value_and_gradients(function, tensors, targets, upstream=1.7):
    loss = function(*tensors, targets)
    return [loss.detach(), *torch.autograd.grad(loss * upstream, tensors)]


def plain(x, weight, bias, targets):
    return F.cross_entropy(F.linear(x, weight, bias).float(), targets)


def exact(x, weight, bias, targets):
    return F.cross_entropy(F.linear(x, weight, bias), targets)


@settings(max_examples=60)
@given(SHAPES)
def test_equals_cross_entropy_in_float32(shape):
    rows, width, vocabulary, chunk = shape
    tensors, targets = inputs(rows, width, vocabulary)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(losses, "CHUNK_ELEMENTS", chunk)  # from one row at a time to all at once
        patch.setattr(losses, "CHUNK_ROWS", 1)
        actual = value_and_gradients(linear_cross_entropy, tensors, targets)
    for got, expected in zip(actual, value_and_gradients(plain, tensors, targets), strict=True):
        torch.testing.assert_close(got, expected)
        assert got.dtype == torch.float32


@settings(max_examples=60)
@given(SHAPES)
def test_bfloat16_is_as_near_the_truth_as_pytorch(shape):
    """The error against float64 is at most twice (value) or five times (gradients) that of PyTorch under autocast."""
    rows, width, vocabulary, chunk = shape
    check_bfloat16(rows, width, vocabulary, chunk)


def test_bfloat16_gradients_of_many_chunks():
    """Sums over rows are kept in float32: in bfloat16 a thousand small terms would be lost against a large sum."""
    check_bfloat16(rows=2000, width=8, vocabulary=4, chunk=4)


def check_bfloat16(rows, width, vocabulary, chunk):
    tensors, targets = inputs(rows, width, vocabulary)
    truth = value_and_gradients(exact, [t.detach().double().requires_grad_() for t in tensors], targets)
    with pytest.MonkeyPatch.context() as patch, torch.autocast("cpu", torch.bfloat16):
        patch.setattr(losses, "CHUNK_ELEMENTS", chunk)
        patch.setattr(losses, "CHUNK_ROWS", 1)
        actual = value_and_gradients(linear_cross_entropy, tensors, targets)
        reference = value_and_gradients(plain, tensors, targets)
    for factor, got, theirs, true, terms in zip(
        (2, 5, 5, 5), actual, reference, truth, sizes_of_terms(tensors, targets), strict=True
    ):
        assert got.dtype == torch.float32
        few_roundings = 2**-7 * terms  # of the largest sum's terms: theirs can be exact by luck
        assert float((got - true).abs().max()) <= factor * float((theirs - true).abs().max()) + few_roundings


def sizes_of_terms(tensors, targets, upstream=1.7):
    """The largest sum of absolute terms behind the value and behind each gradient."""
    x, weight, bias = (t.detach().double() for t in tensors)
    logits = F.linear(x, weight, bias)
    error = (logits.softmax(1) - F.one_hot(targets, len(weight))).abs() * upstream / len(x)
    terms = (error @ weight.abs(), error.T @ x.abs(), error.sum(0))
    return [float(logits.abs().max()), *(float(term.max()) for term in terms)]


class LargestTensor(TorchDispatchMode):
    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.elements = max(self.elements, out.numel())
        return out


@pytest.mark.parametrize(("elements", "rows", "chunk"), [(4096, 1, 8), (1, 4, 4)])
def test_logits_are_never_whole(elements, rows, chunk):
    tensors, targets = inputs(rows=64, width=4, vocabulary=512)
    with pytest.MonkeyPatch.context() as patch, LargestTensor() as largest:
        patch.setattr(losses, "CHUNK_ELEMENTS", elements)
        patch.setattr(losses, "CHUNK_ROWS", rows)
        value_and_gradients(linear_cross_entropy, tensors, targets)
    assert largest.elements == chunk * 512


def test_large_logits_do_not_overflow():
    tensors, targets = inputs(6, 3, 5)
    big = [t.detach().mul(200).requires_grad_() for t in tensors]
    for got, expected in zip(
        value_and_gradients(linear_cross_entropy, big, targets), value_and_gradients(plain, big, targets), strict=True
    ):
        assert got.isfinite().all()
        torch.testing.assert_close(got, expected)
