"""The plugins launch what torch launches: for the same shapes the same kernels with the same arguments, as a driver
that only records sees them, and as the launch code in Python hands them to Triton. And they say what is wrong."""

from __future__ import annotations

import ctypes
import shutil
import struct
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from plugin_harness import EVEN, INT, LONG, TINY, Failure, Fake, Plugins, Stub
from torch import Tensor

from genrec.export.kernel_images import Compiled, Shapes
from genrec.kernels import launch

pytest.importorskip("triton", reason="Triton has wheels for Linux only")

from genrec.kernels.group_layer_norm import triton as norm_kernels
from genrec.kernels.moe.triton_experts import experts
from genrec.kernels.moe.triton_route import route
from genrec.kernels.relu_attention.triton_call import dense
from genrec.kernels.relu_attention.triton_forward import attention

WORKSPACE, STREAM = 0x7000_0000_0000, 77
# Shapes and dtype, the device's compute capability, and the architecture whose rows of the launch tables it takes.
DEVICES = {
    "sm_80": (EVEN, torch.float16, 80, 80),
    "the code of sm_80 on sm_87": (EVEN, torch.float16, 87, 80),
    "sm_90": (EVEN, torch.float16, 90, 90),
    "PTX on sm_121": (EVEN, torch.float16, 121, 86),
    "tiny on sm_90": (TINY, torch.float32, 90, 86),
}


@pytest.fixture(scope="module")
def plugins(harness: Path, library: Path, stub: Stub, tmp_path_factory: pytest.TempPathFactory) -> Plugins:
    """A copy of the library, which opens the driver of this module and keeps it."""
    return Plugins(harness, Path(shutil.copy(library, tmp_path_factory.mktemp("recorded"))))


@dataclass
class Case:
    """A plugin, and the launch code of the same operator."""

    op: str
    attributes: dict[str, Any]
    inputs: list[Tensor]
    call: Callable[..., Any]

    def outputs(self) -> list[Tensor]:
        result = self.call(*self.inputs)
        return list(result) if isinstance(result, tuple) else [result]


def empty(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def norm(shapes: Shapes, dtype: torch.dtype, *size: int, adds: bool, ids: torch.dtype, groups: int = 3) -> Case:
    x, residual = (empty(*size, shapes.d_model, dtype=dtype) for _ in range(2))
    weight, bias = (empty(groups, shapes.d_model, dtype=dtype) for _ in range(2))
    rest, attributes = [empty(*size, dtype=ids), weight, bias], {"eps": 0.25}
    if adds:
        call = norm_kernels._add_group_layer_norm
        return Case("AddGroupLayerNorm", attributes, [x, residual, *rest], lambda *tensors: call(*tensors, 0.25))
    return Case(
        "GroupLayerNorm", attributes, [x, *rest], lambda *tensors: norm_kernels._group_layer_norm(*tensors, 0.25)
    )


def attend(
    shapes: Shapes, dtype: torch.dtype, batch: int, rows: int, keys: int, buckets: int = 6,
    limited: bool = False, causal: int = 0, visible: int = 0,
) -> Case:  # fmt: skip
    heads, dim = shapes.heads, shapes.d_model // shapes.heads
    q, k, v = (empty(batch, heads, length, dim, dtype=dtype) for length in (rows, keys, keys))
    limit = [empty(batch, rows, dtype=torch.int64)] if limited else []
    attributes = {"scale": 0.5, "divisor": 3.0, "visible": visible} | ({} if limited else {"causal": causal})

    def call(q: Tensor, k: Tensor, v: Tensor, *rest: Tensor) -> Tensor:
        options = (rest[0] if limited else None, rest[-1], None, bool(causal), 0.5, 3.0, bool(visible))
        return attention(dense(q, k, v, *options), may_split=False)

    inputs = [q, k, v, *limit, empty(heads, buckets, dtype=dtype)]
    return Case("ReluAttentionLimited" if limited else "ReluAttention", attributes, inputs, call)


def routing(shapes: Shapes, dtype: torch.dtype, tokens: int, renormalize: int) -> Case:
    logits, bias = empty(tokens, shapes.experts, dtype=dtype), empty(shapes.experts, dtype=dtype)
    attributes = {"top_k": shapes.top_k, "renormalize": renormalize}
    return Case("MoeRoute", attributes, [logits, bias], lambda x, bias: route(x, shapes.top_k, bias, bool(renormalize)))


def mixture(shapes: Shapes, dtype: torch.dtype, tokens: int) -> Case:
    e, k, d, f = shapes.experts, shapes.top_k, shapes.d_model, shapes.d_expert
    weights, indices = empty(tokens, k, dtype=torch.float32), empty(tokens, k, dtype=torch.int32)
    w_gate_up, w_down = empty(e, 2 * f, d, dtype=dtype), empty(e, d, f, dtype=dtype)
    return Case("MoeExperts", {}, [empty(tokens, d, dtype=dtype), weights, indices, w_gate_up, w_down], experts)


def every_case(shapes: Shapes, dtype: torch.dtype) -> Iterator[Case]:
    for size, adds, ids, groups in (
        ((1,), False, torch.int32, 1), ((3, 7), True, torch.int64, 3), ((16, 16), False, torch.int64, 16),
        ((1, 1, 33), True, torch.int32, 5), ((), False, torch.int64, 2),
    ):  # fmt: skip
        yield norm(shapes, dtype, *size, adds=adds, ids=ids, groups=groups)
    for rows, keys in (1, 1), (1, 700), (5, 9), (3, 0), (16, 16), (17, 33), (48, 64), (64, 700), (65, 70), (200, 130):
        for batch, buckets in (1, 1), (3, 6), (16, 128):
            yield attend(shapes, dtype, batch, rows, keys, buckets)
            yield attend(shapes, dtype, batch, rows, keys, buckets, limited=True, visible=1)
    for causal, visible in (0, 1), (1, 0), (1, 1):
        yield attend(shapes, dtype, 2, 11, 13, causal=causal, visible=visible)
    yield attend(shapes, dtype, 2, 11, 13, limited=True)
    for tokens in 1, 16, 33, 1000:
        for renormalize in 0, 1:
            yield routing(shapes, dtype, tokens, renormalize)
    for tokens in 1, 2, 7, 16, 33, 100, 128, 512, 513, 5000:
        yield mixture(shapes, dtype, tokens)


@contextmanager
def recording(arch: int) -> Iterator[list[tuple[Any, ...]]]:
    """Launches of the code in Python, those with an empty grid left out, as `launch` does."""
    launches: list[tuple[Any, ...]] = []
    launch.target = launch.Target(arch, lambda *one: launches.append(one) if 0 not in one[1] else None)
    try:
        yield launches
    finally:
        launch.target = None


def fakes(tensors: list[Tensor], first: int = 0) -> list[Fake]:
    return [
        Fake(tuple(tensor.shape), tensor.dtype, (1 + first + number) << 36) for number, tensor in enumerate(tensors)
    ]


def launched(plugins: Plugins, case: Case, inputs: list[Fake], outputs: list[Fake], **options: Any) -> int:
    return plugins.run(case.op, case.attributes, inputs, outputs, WORKSPACE, STREAM, **options)


def image_of(call: dict[str, Any], images: list[Compiled]) -> Compiled:
    """The image that the driver was given; several kernels may share it."""
    content = ctypes.string_at(call["image"], call["size"])
    return next(image for image in images if image.content.startswith(content))


def decoded(image: Compiled, arguments: list[list[int]]) -> list[Any]:
    """What the driver read, as the arguments of the launch in Python."""
    *passed, scratch, profile = arguments
    assert scratch == profile == [8, 0]
    values, rest = [], iter(passed)
    for code, _ in image.parameters:
        if code in "n1":
            values.append(None if code == "n" else 1)
            continue
        size, bits = next(rest)
        assert size == (4 if code in "iIf" else 8)
        assert code.islower() or bits % 16 == 0
        values.append(struct.unpack("<f", struct.pack("<I", bits))[0] if code == "f" else bits)
    assert not list(rest)
    return values


@pytest.mark.parametrize("name", DEVICES)
def test_plugins_launch_what_torch_launches(name, plugins: Plugins, stub: Stub, images):
    shapes, dtype, capability, arch = DEVICES[name]
    stub.use(capability)
    sizes: dict[int, int] = {}
    for case in every_case(shapes, dtype):
        with recording(arch) as expected:
            made = case.outputs()
        inputs = fakes(case.inputs)
        outputs = fakes(made, len(inputs))
        stub.calls()
        bytes_needed = launched(plugins, case, inputs, outputs)
        calls = stub.calls()
        sizes |= {call["image"]: call["size"] for call in calls if call["call"] == "load"}
        calls = [call | {"size": sizes[call["image"]]} for call in calls if call["call"] == "launch"]
        places = {
            tensor.untyped_storage()._cdata: fake.address
            for tensor, fake in zip([*case.inputs, *made], [*inputs, *outputs], strict=True)
        }
        internal: dict[int, Tensor] = {}
        assert len(calls) == len(expected), case
        for call, (kernel, grid, arguments, constants) in zip(calls, expected, strict=True):
            image = image_of(call, images)
            assert (image.kernel, call["grid"]) == (kernel.fn.__name__, [*grid, 1, 1][:3]), case
            assert call["block"] == [32 * constants["num_warps"], 1, 1]
            assert call["stream"] == STREAM
            named = {key: int(value) for key, value in constants.items() if key.isupper() and value is not None}
            assert dict(image.constants).items() >= named.items()
            values = decoded(image, call["arguments"])
            for (_, parameter), value, argument in zip(image.parameters, values, arguments, strict=True):
                if isinstance(argument, Tensor):
                    storage = argument.untyped_storage()._cdata
                    if storage not in places:
                        places[storage], internal[value] = value, argument
                    argument = places[storage]
                assert value == argument, f"{case}: {image.kernel} gets {value} for {parameter}"
        assert_apart(internal, bytes_needed)


def assert_apart(internal: dict[int, Tensor], bytes_needed: int) -> None:
    """Tensors in the workspace have room of their own, and begin where a load of any width may."""
    ends = [(at, at + tensor.numel() * tensor.itemsize) for at, tensor in sorted(internal.items())]
    assert all(at % 256 == 0 for at, _ in ends)
    assert all(end <= start for (_, end), (start, _) in pairwise([*ends, (WORKSPACE + bytes_needed, 0)]))
    assert all(at >= WORKSPACE for at, _ in ends)


def test_nothing_is_launched_for_nothing(plugins: Plugins, stub: Stub):
    stub.use(80)
    for case in (
        norm(EVEN, torch.float16, 0, 3, adds=True, ids=torch.int64), attend(EVEN, torch.float16, 0, 3, 3),
        attend(EVEN, torch.float16, 2, 0, 3, limited=True), routing(EVEN, torch.float16, 0, 1),
        mixture(EVEN, torch.float16, 0),
    ):  # fmt: skip
        with recording(80):
            made = case.outputs()
        stub.calls()
        launched(plugins, case, fakes(case.inputs), fakes(made))
        assert stub.calls("launch") == []


def test_kernels_are_loaded_before_a_graph_is_captured_and_once(plugins: Plugins, stub: Stub):
    case = mixture(EVEN, torch.float16, 5000)
    inputs, outputs = fakes(case.inputs), fakes(case.inputs[:1])
    for capability in 80, 90, 121:  # each a context of its own
        stub.use(capability)
        stub.calls()
        launched(plugins, case, inputs, outputs, launches=False)
        kinds = [call["call"] for call in stub.calls()]
        assert kinds.count("load") == 5
        assert "launch" not in kinds
        launched(plugins, case, inputs, outputs)
        assert {call["call"] for call in stub.calls()} == {"launch"}


def test_more_than_48_kb_are_asked_for(plugins: Plugins, stub: Stub):
    case = mixture(EVEN, torch.float16, 5000)
    stub.use(80)
    stub.calls()
    launched(plugins, case, fakes(case.inputs), fakes(case.inputs[:1]))
    calls = stub.calls()
    asked = {call["value"] for call in calls if call["call"] == "attribute"}
    assert asked == {call["shared"] for call in calls if call.get("shared", 0) > 48 << 10} != set()


def test_workspace_is_that_of_the_largest_shapes(plugins: Plugins, stub: Stub):
    stub.use(80)

    def needed(tokens: int, largest: int) -> int:
        case, large = mixture(EVEN, torch.float16, tokens), mixture(EVEN, torch.float16, largest)
        tensors = fakes([*case.inputs, case.inputs[0]])
        for fake, tensor in zip(tensors, [*large.inputs, large.inputs[0]], strict=True):
            fake.largest = tuple(tensor.shape)
        return launched(plugins, case, tensors[:-1], tensors[-1:])

    assert needed(3, 5000) == needed(5000, 5000) > needed(3, 3) > 0


def test_integers_arrive_in_either_width(plugins: Plugins, stub: Stub):
    stub.use(80)
    case = routing(EVEN, torch.float16, 5, 1)
    with recording(80):
        outputs = fakes(case.outputs())
    for kind in INT, LONG:
        case.attributes = {"top_k": (2, kind), "renormalize": (1, kind)}
        stub.calls()
        launched(plugins, case, fakes(case.inputs), outputs)
        assert len(stub.calls("launch")) == 1


NORM = norm(EVEN, torch.float16, 3, 7, adds=True, ids=torch.int64)
ATTEND = attend(EVEN, torch.float16, 2, 5, 9, limited=True)
ROUTE = routing(EVEN, torch.float16, 5, 1)
MIXTURE = mixture(EVEN, torch.float16, 5)
SENTENCES = [
    (NORM, {"eps": -1.0}, {}, "create: genrec::AddGroupLayerNorm (node): eps is -1.000000; expected 0 or more"),
    (NORM, {"eps": float("nan")}, {}, "attribute eps is not finite"),
    (NORM, {"eps": 1}, {}, "attribute eps has the wrong type; expected one float"),
    (ATTEND, {"visible": 2}, {}, "visible is 2; expected 0 or 1"),
    (ATTEND, {"visible": (2**40, LONG)}, {}, "attribute visible is 1099511627776; expected an int32"),
    (ATTEND, {"visible": 1.0}, {}, "attribute visible has the wrong type; expected one int"),
    (ATTEND, {"divisor": -2.0}, {}, "divisor is -2.000000; expected a positive number, or 0"),
    (ROUTE, {"top_k": 0}, {}, "top_k is 0; expected 1 or more"),
    (ROUTE, {"renormalize": -1}, {}, "renormalize is -1; expected 0 or 1"),
    (ROUTE, {"top_k": 3}, {}, "configure: genrec::MoeRoute, configuration: the library was built without the kernels "
     "moe_route fp16 E=4 k=3 renormalize=1"),
    (NORM, {}, {0: {"dtype": torch.bfloat16}}, "format of tensor 1"),
    (NORM, {}, {2: {"dtype": torch.float16}}, "format of tensor 2"),
    (NORM, {}, {1: {"shape": (3, 6, 64)}}, "residual has not the shape of x"),
    (NORM, {}, {2: {"shape": (7, 3)}}, "group_ids has not the shape of x without D"),
    (NORM, {}, {2: {"shape": (21,)}}, "group_ids has 1 dimensions; expected one fewer than x"),
    (NORM, {}, {3: {"shape": (3, 32)}}, "weight has shape (3, 32); expected (G, D) = (3, 64)"),
    (NORM, {}, {0: {"address": 8}}, "x is 8; expected a multiple of 16"),
    (NORM, {}, {0: {"shape": (3, 7, 96)}}, "without the kernels group_layer_norm fp16 D=96 ids=64 residual=1"),
    (ATTEND, {}, {1: {"shape": (2, 2, 9)}}, "k has shape (2, 2, 9); expected 4 dimensions"),
    (ATTEND, {}, {1: {"shape": (2, 1, 9, 32)}}, "k has shape (2, 1, 9, 32); expected (B, H, Lk, D) = (2, 2, 9, 32)"),
    (ATTEND, {}, {3: {"shape": (2, 9)}}, "key_limit has shape (2, 9); expected (B, Lq) = (2, 5)"),
    (ATTEND, {}, {3: {"dtype": torch.int32}}, "format of tensor 3"),
    (ATTEND, {}, {4: {"shape": (2, 0)}}, "rel_bias has shape (2, 0); expected (H, R) = (2, 1)"),
    (ATTEND, {}, {2: {"shape": (2, 2, 9, 16)}}, "without the kernels relu_attention fp16 H=2 D=32 Dv=16 limited=1"),
    (MIXTURE, {}, {3: {"shape": (4, 64, 64)}}, "w_gate_up has shape (4, 64, 64); expected (E, 2F, D) = (4, 128, 64)"),
    (MIXTURE, {}, {2: {"dtype": torch.int64}}, "format of tensor 2"),
    (MIXTURE, {}, {2: {"shape": (5, 3)}}, "without the kernels moe_experts fp16 E=4 k=3 D=64 F=64"),
]  # fmt: skip


@pytest.mark.parametrize(("case", "attributes", "changes", "sentence"), SENTENCES)
def test_what_is_wrong_is_a_sentence(case, attributes, changes, sentence, plugins: Plugins, stub: Stub):
    stub.use(80)
    with recording(80):
        outputs = fakes(case.outputs(), 10)
    inputs = [replace(fake, **changes.get(number, {})) for number, fake in enumerate(fakes(case.inputs))]
    with pytest.raises(Failure) as failure:
        launched(plugins, replace(case, attributes=case.attributes | attributes), inputs, outputs)
    assert sentence in str(failure.value)


def failure_of(plugins: Plugins) -> str:
    with pytest.raises(Failure) as failure:
        launched(plugins, MIXTURE, fakes(MIXTURE.inputs), fakes(MIXTURE.inputs[:1]))
    return str(failure.value)


def test_devices_that_cannot_run_it_are_told(plugins: Plugins, stub: Stub):
    stub.use(75)
    assert "no kernel moe_experts fp16 E=4 k=2 D=64 F=64, order_kernel for sm_75" in failure_of(plugins)
    stub.use_none()
    assert failure_of(plugins).startswith("enqueue: ")
    assert "no CUDA context is current on this thread" in failure_of(plugins)


def test_without_a_driver_only_launching_fails(harness, library, tmp_path, monkeypatch):
    monkeypatch.setenv("GENREC_LIBCUDA", "libnowhere.so")
    plugins = Plugins(harness, Path(shutil.copy(library, tmp_path)))
    inputs, outputs = fakes(MIXTURE.inputs), fakes(MIXTURE.inputs[:1])
    assert launched(plugins, MIXTURE, inputs, outputs, launches=False) > 0
    assert failure_of(plugins).startswith("enqueue: genrec::MoeExperts, launch: there is no CUDA driver: libnowhere.so")


def test_missing_attributes_are_named(plugins: Plugins):
    with pytest.raises(Failure, match="attribute scale is missing"):
        plugins.run("ReluAttention", {"causal": 1}, [], [])


def test_the_library_needs_nothing_of_cuda(library):
    needed = subprocess.run(["ldd", library], capture_output=True, text=True, check=True).stdout
    assert not any(name in needed for name in ("cuda", "nvinfer", "stdc++", "not found"))


@pytest.mark.parametrize("arch", [80, 103, 121])
def test_ptx_assembles_for_other_devices(arch, images, tmp_path):
    """What a driver does with PTX when it loads it."""
    from triton import knobs

    tool = knobs.nvidia.ptxas_blackwell if arch >= 100 else knobs.nvidia.ptxas
    kernels = {image.kernel: image for image in images if image.is_ptx}
    for name, image in kernels.items():
        path = tmp_path / f"{name}.ptx"
        path.write_bytes(image.content.rstrip(b"\0"))
        subprocess.run([tool.path, f"--gpu-name=sm_{arch}", "-O0", path, "-o", tmp_path / "out"], check=True)
