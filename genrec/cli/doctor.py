"""Say what this machine has: versions, compiled kernels, which operators are native, whether there is a GPU."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import genrec
from genrec import kernels
from genrec.kernels.group_layer_norm import reference as norm_reference
from genrec.kernels.library import OPERATORS, native_isa, native_library
from genrec.kernels.moe import reference as moe_reference
from genrec.kernels.relu_attention import reference as attention_reference
from genrec.kernels.rq_nearest import reference as rq_reference

PACKAGES = ("torch", "triton", "numpy", "scipy", "scikit-learn", "duckdb", "pyarrow", "safetensors", "tensorboard")
FACTOR = 2.0  # an operator may err twice as much as plain PyTorch in the same dtype does


@dataclass
class Config:
    check: bool = False
    """Also run every operator against its float64 reference."""


def run(config: Config) -> None:
    """Print the tables; raises ValueError if `check` finds an operator that disagrees."""
    console = Console()
    console.print(_machine())
    console.print(_kernels())
    if config.check:
        devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
        ratios = [(name, device, ratio) for device in devices for name, ratio in error_ratios(device)]
        console.print(_agreement(ratios))
        wrong = [f"{name} on {device} ({ratio:.3g})" for name, device, ratio in ratios if not ratio <= FACTOR]
        if wrong:
            raise ValueError(f"error above {FACTOR:g} times that of plain PyTorch: {', '.join(wrong)}; report this")


def _machine() -> Table:
    table = Table("", "version", title="Machine")
    table.add_row("genrec", genrec.__version__)
    table.add_row("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    for package in PACKAGES:
        table.add_row(package, _version(package))
    isa = f"torch uses {torch.backends.cpu.get_cpu_capability()}, genrec {native_isa() or 'no compiled kernels'}"
    table.add_row("CPU", f"{isa}, {torch.get_num_threads()} threads")
    table.add_row("GPU", torch.cuda.get_device_name() if torch.cuda.is_available() else "none")
    return table


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _kernels() -> Table:
    loaded = kernels.NATIVE_ERROR is None
    where = f"loaded from {native_library()}" if loaded else kernels.NATIVE_ERROR
    table = Table("operator", "CPU", "GPU", title="Kernels", caption=f"compiled CPU kernels: {where}")
    native = {device: kernels.native_operators(device) for device in ("cpu", "cuda")}
    for name in OPERATORS:
        table.add_row(name, *("native" if name in native[device] else "plain PyTorch" for device in ("cpu", "cuda")))
    return table


def _agreement(ratios: list[tuple[str, str, float]]) -> Table:
    table = Table("operator", "device", "error / error of plain PyTorch", title="Against float64")
    for name, device, ratio in ratios:
        table.add_row(name, device, f"{ratio:.2f}" + ("" if ratio <= FACTOR else "  [red]disagrees[/red]"))
    return table


def error_ratios(device: str) -> Iterator[tuple[str, float]]:
    """Per operator: its largest error against the float64 reference over that of the reference run in float32."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    q, k, v, rel_bias = randn(2, 2, 33, 32), randn(2, 2, 47, 32), randn(2, 2, 47, 16), randn(2, 8)
    yield "relu_attention", _ratio(
        lambda q, k, v, b: kernels.relu_attention(q, k, v, causal=True, rel_bias=b, normalizer="visible"),
        lambda q, k, v, b: attention_reference.relu_attention(q, k, v, causal=True, rel_bias=b, normalizer="visible"),
        q, k, v, rel_bias,
    )  # fmt: skip
    cu = torch.tensor([0, 20, 20, 61], device=device)
    q, k, v = randn(64, 2, 32), randn(64, 2, 32), randn(64, 2, 16)
    yield "relu_attention_varlen", _ratio(
        lambda q, k, v, b: kernels.relu_attention_varlen(q, k, v, cu, cu, 41, 41, causal=True, rel_bias=b),
        lambda q, k, v, b: attention_reference.relu_attention_varlen(q, k, v, cu, cu, causal=True, rel_bias=b),
        q, k, v, rel_bias,
    )  # fmt: skip
    x, residual, weight, bias = randn(50, 64), randn(50, 64), randn(3, 64), randn(3, 64)
    groups = torch.arange(50, device=device) % 3
    yield "group_layer_norm", _ratio(
        lambda x, w, b: kernels.group_layer_norm(x, groups, w, b),
        lambda x, w, b: norm_reference.group_layer_norm(x, groups, w, b),  # type: ignore[arg-type, return-value]
        x, weight, bias,
    )  # fmt: skip
    yield "add_group_layer_norm", _ratio(
        lambda x, r, w, b: kernels.group_layer_norm(x, groups, w, b, residual=r)[0],
        lambda x, r, w, b: norm_reference.group_layer_norm(x, groups, w, b, residual=r)[0],
        x, residual, weight, bias,
    )  # fmt: skip
    logits = randn(50, 8)
    yield (
        "moe_route",
        _ratio(
            lambda logits: kernels.moe_route(logits, 3)[0], lambda logits: moe_reference.moe_route(logits, 3)[0], logits
        ),
    )
    weights, indices = moe_reference.moe_route(logits, 3)
    yield "moe_experts", _ratio(
        lambda x, w, gate_up, down: kernels.moe_experts(x, w, indices, gate_up, down),
        lambda x, w, gate_up, down: moe_reference.moe_experts(x, w, indices, gate_up, down),
        x, weights, randn(8, 64, 64), randn(8, 64, 32),
    )  # fmt: skip
    yield "rq_nearest", _ratio(
        lambda x, *books: _reached(x, books, kernels.rq_nearest),
        lambda x, *books: _reached(x, books, rq_reference.rq_nearest),
        x, randn(100, 64), randn(40, 64),
    )  # fmt: skip


def _reached(x: Tensor, books: tuple[Tensor, ...], search: Callable[..., tuple[Tensor, Tensor]]) -> Tensor:
    """Squared distance of every row to what the search chose for it: near-ties differ in codes but not in this."""
    codes, _ = search(x, books)
    left = x.double()
    for level, book in enumerate(books):
        left = left - book.double()[codes[:, level]]
    return left.square().sum(1)


def _ratio(operator: Callable[..., Tensor], reference: Callable[..., Tensor], *inputs: Tensor) -> float:
    truth = reference(*(x.double() for x in inputs))
    plain = (reference(*inputs) - truth).abs().max().item()
    floor = torch.finfo(torch.float32).eps * truth.abs().max().item()  # the rounding of the result alone
    return (operator(*inputs) - truth).abs().max().item() / max(plain, floor)
