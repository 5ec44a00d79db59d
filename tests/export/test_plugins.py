"""Building the plugin library: what is compiled, and what is said where something is missing."""

from __future__ import annotations

import json
import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from plugin_harness import EVEN, TINY

from genrec.export import kernel_images, plugins
from genrec.export.kernel_images import EVERY, Compiled, Shapes, cases, compile_kernels
from genrec.export.plugins import Compiler, build_plugins, main
from genrec.kernels import launch
from genrec.kernels.compilation import Image
from genrec.models.ugt import UGTConfig

HALF = [torch.float16]


def recorded(call: Any, arch: int) -> list[tuple[Any, ...]]:
    launches: list[tuple[Any, ...]] = []
    launch.target = launch.Target(arch, lambda *one: launches.append(one))
    try:
        call()
    finally:
        launch.target = None
    return launches


def test_the_sizes_of_a_model():
    config = UGTConfig(d_model=96, heads=3, experts=5, top_k=4, d_expert=20)
    assert Shapes.of(config) == Shapes(d_model=96, heads=3, experts=5, top_k=4, d_expert=20)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"d_expert": 0}, "d_expert is 0; expected 1 or more"),
        ({"heads": 3}, r"d_model is 64; expected a multiple of heads \(3\), at most 256 times"),
        ({"d_model": 1024}, r"d_model is 1024; expected a multiple of heads \(2\), at most 256 times"),
        ({"top_k": 5}, r"top_k is 5; expected 1 to experts \(4\)"),
    ],
)
def test_sizes_that_no_kernel_has(change, sentence):
    with pytest.raises(ValueError, match=sentence):
        Shapes(**(vars(EVEN) | change))


@pytest.mark.parametrize(
    ("shapes", "dtypes", "archs", "sentence"),
    [
        ([], HALF, [80], "expected at least one of each"),
        ([EVEN], [], [80], "expected at least one of each"),
        ([EVEN], [torch.float64], [80], "dtypes hold torch.float64; expected torch.float16, "),
        ([EVEN], HALF, [80, 75], "archs hold 75; expected some of 80, 86, 89, 90, 100, 120"),
    ],
)
def test_arguments_are_checked(shapes, dtypes, archs, sentence):
    pytest.importorskip("triton", reason="Triton has wheels for Linux only")
    with pytest.raises(ValueError, match=sentence):
        compile_kernels(shapes, dtypes, archs)


@pytest.mark.parametrize(("arch", "classes"), [(80, {16, 64, 128}), (90, {64, 128})])
def test_every_kernel_is_compiled_in_every_size_class(arch, classes):
    pytest.importorskip("triton", reason="Triton has wheels for Linux only")
    found: dict[str, set[int]] = {}
    for case in cases(EVEN, torch.float16, arch):
        for kernel, *_ in recorded(case.call, arch):
            found.setdefault(kernel.fn.__name__, set()).add(case.most)
    assert found.keys() == kernel_images.STATIC.keys()
    assert found["hidden_kernel"] == found["rows_kernel"] == classes
    assert found["forward"] == {16, 64, EVERY}
    assert found["_forward"] == found["route_kernel"] == {EVERY}
    sorts = [
        constants["ALONE"]
        for case in cases(TINY, torch.float16, arch)
        for kernel, _, _, constants in recorded(case.call, arch)
        if kernel.fn.__name__ == "order_kernel"
    ]
    assert set(sorts) == {True, False}


def image(**changes: Any) -> Image:
    """A sort of pairs that may be launched."""
    metadata = SimpleNamespace(
        shared=1024, num_warps=4, num_ctas=1, global_scratch_size=0, profile_scratch_size=0, tensordesc_meta=None,
        launch_pdl=False,
    )  # fmt: skip
    values = {
        "signature": {
            "order": "*i32",
            "pairs": "i32",
            "experts": "i32",
            "stride_ik": "constexpr",
            "BLOCK": "constexpr",
        },
        "constants": {"stride_ik": 1, "BLOCK": 1024},
        "divisible": frozenset({"order", "experts"}),
        "params": ("u64", "u32", "u32", "u64", "u64"),
    } | changes
    for name in metadata.__dict__.keys() & changes:
        setattr(metadata, name, changes[name])
    params = ",\n".join(f".param .{kind} order_kernel_param" for kind in values["params"])
    fields = [values[name] for name in ("signature", "constants", "divisible")]
    return Image(
        "order_kernel", 80, "a case", *fields, metadata, {"ptx": f".visible .entry order_kernel(\n{params})\n{{}}"}
    )


def test_how_parameters_are_passed():
    kernel_images._check_image(image(), 80)
    codes = [kernel_images._code(image(), name) for name in ("order", "pairs", "experts", "stride_ik")]
    assert codes == ["P", "i", "I", "1"]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"divisible": frozenset({"pairs"})}, "is compiled for one value of pairs; expected that it serves any"),
        ({"constants": {"stride_ik": 1, "pairs": 1}}, "is compiled for one value of pairs"),
        ({"shared": 200 * 1024}, "takes 200 KB of shared memory; a block can have 163"),
        ({"num_ctas": 2}, "needs clusters, scratch memory or tensor descriptors; expected a plain kernel"),
        ({"params": ("u64", "u32", "u64", "u64")}, r"takes parameters of \['64', '32', '64', '64'\] bits"),
    ],
)
def test_images_that_the_library_cannot_launch(changes, sentence):
    with pytest.raises(RuntimeError, match=rf"order_kernel for sm_80 \(a case\) {sentence}"):
        kernel_images._check_image(image(**changes), 80)


def test_what_is_missing_is_said_before_anything_is_compiled(compiler, tmp_path, monkeypatch):
    monkeypatch.setattr(plugins, "compile_kernels", pytest.fail)
    for name in "TENSORRT_INCLUDE_DIR", "CUDA_INCLUDE_DIR":
        with monkeypatch.context() as patch:
            patch.setenv(name, str(tmp_path))
            sentence = rf"g\+\+ does not find .*expected the directory that has it in {name}"
            with pytest.raises(RuntimeError, match=sentence):
                build_plugins([EVEN], HALF, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(plugins, "_source_folders", list)
        with pytest.raises(RuntimeError, match="csrc/tensorrt is not here; expected a checkout of genrec"):
            build_plugins([EVEN], HALF, tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match=r"g\+\+ is not on PATH"):
        Compiler()


def test_a_library_appears_whole_or_not_at_all(compiler, tmp_path):
    broken = Compiled('a "name"', "kernel", EVERY, 80, False, 0, 128, (), (), "entry", b"")
    with pytest.raises(RuntimeError, match=r"g\+\+ does not build"):
        compiler.link([broken], tmp_path / "library.so")
    assert list(tmp_path.iterdir()) == []


def test_the_environment_of_the_workers_ends_with_them(monkeypatch):
    monkeypatch.setenv("GENREC_ONE", "1")
    monkeypatch.delenv("GENREC_TWO", raising=False)
    with kernel_images._environment({"GENREC_ONE": "2", "GENREC_TWO": "2"}):
        assert os.environ["GENREC_ONE"] == os.environ["GENREC_TWO"] == "2"
    assert os.environ["GENREC_ONE"] == "1"
    assert "GENREC_TWO" not in os.environ


def test_equal_images_are_kept_once(tmp_path):
    def compiled(name: str, content: bytes) -> Compiled:
        return Compiled(name, "kernel", 64, 90, False, 0, 128, (("P", "x"), ("n", "y")), (("M", 2),), "k", content)

    plugins.write_table([compiled("a", b"one"), compiled("b", b"two"), compiled("c", b"one")], tmp_path)
    assert (tmp_path / "images.bin").read_bytes() == b"one" + bytes(61) + b"two"
    rows = (tmp_path / "images.inc").read_text().splitlines()
    assert rows[0] == """{"a", "kernel", 64, 90, 0, 0, 128, 0u, "k", {{'P', "x"}, {'n', "y"}}, {{"M", 2}}},"""
    assert [" 0u," in row for row in rows] == [True, False, True]


def test_the_command(compiler, tmp_path, monkeypatch, capsys):
    asked = []

    def compile_nothing(*arguments: Any) -> list[Any]:
        asked.append(arguments)
        return []

    monkeypatch.setattr(plugins, "compile_kernels", compile_nothing)
    monkeypatch.setattr(Compiler, "link", lambda self, images, library: library.write_bytes(b"1") and library)
    options = ["--model", str(tmp_path), "--dtype", "fp16", "fp32", "--arch", "90", "--out", str(tmp_path)]
    assert main(options) == 2
    assert "model.json does not exist; expected the output of genrec train" in capsys.readouterr().err
    (tmp_path / "model.json").write_text(json.dumps({"model": {**vars(UGTConfig()), "token_types": ["item"]}}))
    assert main(options) == 0
    assert asked == [([Shapes.of(UGTConfig())], [torch.float16, torch.float32], [90])]
    assert capsys.readouterr().out == f"{tmp_path / 'libgenrec_trt.so'}: 1 MB\n"
