"""How the operators reach their kernels: registration, loading, building, and compiling all of them together."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from op_contract import DEVICE, assert_compiles
from torch._subclasses import FakeTensorMode

from genrec import kernels
from genrec.kernels import library

ROOT = Path(__file__).parents[2]


def test_every_operator_is_registered_for_every_device():
    assert len(library.OPERATORS) == 7
    for name in library.OPERATORS:
        for key in ("CPU", "CUDA", "Autograd", "Meta"):
            assert torch._C._dispatch_has_kernel_for_dispatch_key(f"genrec::{name}", key) or (
                torch._C._dispatch_has_kernel_for_dispatch_key(f"genrec::{name}", "CompositeExplicitAutograd")
            ), f"{name} has no kernel for {key}"


def test_public_functions_take_the_short_way_only_where_nothing_else_has_to_see_the_call(monkeypatch):
    """Eager calls go to the operator's gradient; autocast, torch.compile and torch.func go by the dispatcher."""
    taken = []
    monkeypatch.setitem(library.DIFFERENTIABLE, "moe_route", lambda *arguments: taken.append("moe_route"))
    route = library.entry("moe_route")
    logits = torch.randn(3, 4, device=DEVICE)
    assert route(logits, 2, None, True) is None
    assert taken == ["moe_route"]
    with torch.autocast(DEVICE.type, torch.bfloat16):
        assert len(route(logits, 2, None, True)) == 2
    assert len(torch.compile(route, backend="eager", fullgraph=True)(logits, 2, None, True)) == 2
    with pytest.raises(RuntimeError, match="functorch transforms"):
        torch.func.grad(lambda x: route(x, 2, None, True)[0].sum())(logits)
    assert taken == ["moe_route"]


@pytest.mark.parametrize("name", ["moe_route", "rq_nearest"])
def test_torch_func_is_refused_rather_than_wrong(name):
    x, codebook = torch.randn(3, 4, device=DEVICE), torch.randn(5, 4, device=DEVICE)
    calls = {
        "moe_route": lambda t: kernels.moe_route(t, 2)[0].sum(),
        "rq_nearest": lambda t: kernels.rq_nearest(x, [t])[1].sum(),
    }
    with pytest.raises(RuntimeError, match="functorch transforms"):
        torch.func.grad(calls[name])(codebook)


def test_native_operators_are_those_of_the_compiled_library():
    loaded = kernels.NATIVE_ERROR is None
    assert ("rq_nearest" in kernels.native_operators("cpu")) == loaded
    assert (library.native_isa() is not None) == loaded


def test_a_missing_library_is_a_sentence(monkeypatch):
    monkeypatch.setattr(library, "native_library", lambda: None)
    assert "were not built; run pip install --no-build-isolation" in library.load_native()


def test_a_library_of_another_torch_is_a_sentence(monkeypatch, tmp_path):
    broken = tmp_path / "_C.abi3.so"
    broken.write_bytes(b"not a library")
    monkeypatch.setattr(library, "native_library", lambda: broken)
    message = library.load_native()
    assert "does not load into torch" in message
    assert "\n" not in message


@pytest.mark.parametrize("environment", [{"CC": "/bin/false", "CXX": "/bin/false"}, {"PYTHONPATH": "no-torch"}])
def test_a_build_without_compiler_or_torch_says_so_once(environment, tmp_path):
    if "PYTHONPATH" in environment:
        (tmp_path / "torch.py").write_text("raise ImportError('hidden')")
        environment = {"PYTHONPATH": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "-b", tmp_path / "lib", "-t", tmp_path / "tmp"],
        cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert result.stderr.count("genrec: installing in pure PyTorch") == 1
    assert not list(tmp_path.rglob("*.so"))


def test_values_are_not_looked_at_while_tracing():
    with FakeTensorMode():
        x, ids, affine = torch.empty(4, 8), torch.empty(4, dtype=torch.int64), torch.empty(3, 8)
        assert kernels.group_layer_norm(x, ids, affine, affine).shape == (4, 8)
        cu = torch.empty(3, dtype=torch.int64)
        q = torch.empty(4, 2, 8)
        assert kernels.relu_attention_varlen(q, q, q[..., :5], cu, cu, 4, 4).shape == (4, 2, 5)
        assert kernels.moe_ffn(x, affine, torch.empty(3, 6, 8), torch.empty(3, 8, 3), 2).shape == (4, 8)
        quantized = kernels.rq_nearest(x, [affine, affine])[1]
        assert quantized.shape == (4, 8)


def test_all_operators_in_one_inductor_graph():
    def layer(x, weight, bias, router, gate_up, down, book):
        ids = torch.arange(x.shape[0], device=x.device) % 3
        h, s = kernels.group_layer_norm(x, ids, weight, bias, residual=x)
        heads = h.view(1, -1, 2, 4).transpose(1, 2)
        a = kernels.relu_attention(heads, heads, heads, causal=True).transpose(1, 2).reshape(x.shape)
        cu = torch.tensor([0, 2, 5], device=x.device)
        packed = h.view(-1, 2, 4)
        b = kernels.relu_attention_varlen(packed, packed, packed, cu, cu, 5, 5, normalizer="visible").view(x.shape)
        y = kernels.moe_ffn(s + a + b, router, gate_up, down, 2)
        return y + kernels.rq_nearest(y, [book])[1]

    def call(t):
        g = torch.Generator().manual_seed(t)
        shapes = (t, 8), (3, 8), (3, 8), (4, 8), (4, 6, 8), (4, 8, 3), (7, 8)
        return [torch.randn(shape, generator=g).to(DEVICE) for shape in shapes]

    assert_compiles(layer, call(6), call(9), backend="inductor")


def test_plain_pytorch_says_so_once(tmp_path):
    shutil.copytree(ROOT / "genrec", tmp_path / "genrec", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    code = "import genrec.kernels, genrec.kernels.moe, genrec.models.ugt"
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert run.stderr.count("genrec runs in plain PyTorch on the CPU, because the compiled kernels were not built") == 1
