"""The plugins on a GPU: what they write is what the operators give in torch, and a captured graph gives it again."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from plugin_harness import EVEN, TINY, Plugins
from torch import Tensor

from genrec.export.kernel_images import ALL, Shapes, compile_kernels
from genrec.export.plugins import LIBRARY, Compiler

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]

Call = tuple[str, dict[str, Any], list[Tensor], Callable[..., Any]]


@pytest.fixture(scope="module")
def plugins(compiler: Compiler, harness: Path, tmp_path_factory: pytest.TempPathFactory) -> Plugins:
    assert "GENREC_LIBCUDA" not in os.environ
    major, minor = torch.cuda.get_device_capability()
    archs = [arch for arch in ALL if arch == 10 * major + minor]  # or else PTX
    images = compile_kernels([TINY, EVEN], DTYPES, archs)
    return Plugins(harness, compiler.link(images, tmp_path_factory.mktemp("cuda") / LIBRARY))


def random(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, device="cuda").to(dtype)


def integers(end: int, *shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randint(end, shape, device="cuda", dtype=dtype)


def norm(shapes: Shapes, dtype: torch.dtype, ids: torch.dtype) -> Call:
    tables = [random(5, shapes.d_model, dtype=dtype) for _ in range(2)]
    inputs = [random(7, 33, shapes.d_model, dtype=dtype), integers(5, 7, 33, dtype=ids), *tables]
    return "GroupLayerNorm", {"eps": 1e-5}, inputs, lambda *tensors: torch.ops.genrec.group_layer_norm(*tensors, 1e-5)


def added_norm(shapes: Shapes, dtype: torch.dtype, ids: torch.dtype) -> Call:
    _, attributes, (x, *rest), _ = norm(shapes, dtype, ids)
    call = torch.ops.genrec.add_group_layer_norm
    return "AddGroupLayerNorm", attributes, [x, random(*x.shape, dtype=dtype), *rest], lambda *t: call(*t, 1e-5)


def attention(
    shapes: Shapes, dtype: torch.dtype, rows: int, keys: int, causal: int, visible: int, limited: bool
) -> Call:
    heads, dim = shapes.heads, shapes.d_model // shapes.heads
    q, k, v = (random(3, heads, length, dim, dtype=dtype) for length in (rows, keys, keys))
    bias, limit = random(heads, 16, dtype=dtype), integers(keys + 5, 3, rows, dtype=torch.int64)
    attributes = {"scale": 0.25, "divisor": 0.0, "visible": visible}

    def call(q: Tensor, k: Tensor, v: Tensor, *rest: Tensor) -> Tensor:
        options = (rest[0] if limited else None, rest[-1], None, bool(causal), 0.25, 0.0, bool(visible))
        return torch.ops.genrec.relu_attention(q, k, v, *options)

    if limited:
        return "ReluAttentionLimited", attributes, [q, k, v, limit, bias], call
    return "ReluAttention", attributes | {"causal": causal}, [q, k, v, bias], call


def routing(shapes: Shapes, dtype: torch.dtype, tokens: int, renormalize: int) -> Call:
    inputs = [random(tokens, shapes.experts, dtype=dtype), random(shapes.experts, dtype=dtype)]
    attributes = {"top_k": shapes.top_k, "renormalize": renormalize}
    call = torch.ops.genrec.moe_route
    return "MoeRoute", attributes, inputs, lambda x, bias: call(x, shapes.top_k, bias, bool(renormalize))


def mixture(shapes: Shapes, dtype: torch.dtype, tokens: int) -> Call:
    e, k, d, f = shapes.experts, shapes.top_k, shapes.d_model, shapes.d_expert
    weights = torch.rand(tokens, k, device="cuda")
    chosen = [integers(e, tokens, k, dtype=torch.int32), random(e, 2 * f, d, dtype=dtype), random(e, d, f, dtype=dtype)]
    return "MoeExperts", {}, [random(tokens, d, dtype=dtype), weights, *chosen], torch.ops.genrec.moe_experts


CALLS = [
    *((norm, ids) for ids in (torch.int32, torch.int64)),
    *((added_norm, ids) for ids in (torch.int32, torch.int64)),
    *((attention, rows, keys, causal, visible, False)
      for rows, keys in ((1, 600), (5, 0), (16, 16), (40, 70), (130, 130))
      for causal, visible in ((0, 0), (0, 1), (1, 0), (1, 1))),
    *((attention, rows, keys, 0, visible, True) for rows, keys in ((1, 600), (40, 70), (90, 50)) for visible in (0, 1)),
    *((routing, tokens, renormalize) for tokens in (1, 1000) for renormalize in (0, 1)),
    *((mixture, tokens) for tokens in (1, 7, 100, 513, 5000)),
]  # fmt: skip


def run(plugins: Plugins, call: Call, outputs: list[Tensor], workspace: Tensor | None = None) -> int:
    op, attributes, inputs, _ = call
    stream = torch.cuda.current_stream().cuda_stream
    pointer = None if workspace is None else workspace.data_ptr()
    return plugins.run(op, attributes, inputs, outputs, pointer, stream, launches=workspace is not None)


def prepared(plugins: Plugins, call: Call) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """(what torch gives, poisoned memory for it, workspace), with the kernels loaded."""
    *_, inputs, operator = call
    result = operator(*inputs)
    expected = list(result) if isinstance(result, tuple) else [result]
    outputs = [torch.full_like(tensor, -1 if tensor.dtype == torch.int32 else float("nan")) for tensor in expected]
    needed = run(plugins, call, outputs)
    return expected, outputs, torch.full((needed,), 255, dtype=torch.uint8, device="cuda")


@pytest.mark.parametrize("call", CALLS, ids=lambda call: " ".join([call[0].__name__, *map(str, call[1:])]))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shapes", [TINY, EVEN], ids=["tiny", "even"])
def test_plugins_give_what_torch_gives(shapes, dtype, call, plugins):
    torch.manual_seed(0)
    make, *arguments = call
    made = make(shapes, dtype, *arguments)
    expected, outputs, workspace = prepared(plugins, made)
    run(plugins, made, outputs, workspace)
    for output, tensor in zip(outputs, expected, strict=True):
        torch.testing.assert_close(output, tensor)


def test_a_captured_graph_gives_the_same(plugins):
    call = mixture(EVEN, torch.float16, 700)
    expected, outputs, workspace = prepared(plugins, call)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(plugins, call, outputs, workspace)
    assert outputs[0].isnan().all()
    graph.replay()
    torch.testing.assert_close(outputs[0], expected[0])
