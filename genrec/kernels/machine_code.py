"""What stands in a compiled kernel: registers, stack and instructions, by the tools that come with Triton."""

from __future__ import annotations

import itertools
import re
import struct
import subprocess
import tempfile
from collections.abc import Sequence


def usage(cubin: bytes) -> dict[str, int]:
    """{"REG": registers of a thread, "STACK": bytes of a thread, "LOCAL": bytes of a thread}"""
    from triton import knobs

    report = _output_of([knobs.nvidia.cuobjdump.path, "-res-usage"], cubin)
    return {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", report)}


def opcodes(cubins: Sequence[bytes], arch: int) -> list[set[str]]:
    """The names of the instructions of every kernel, all compiled for sm_<arch>.

    The disassembler takes most of a second to start, so the code of all kernels goes through it as one block of bytes.
    """
    from triton import knobs

    codes = [_code(cubin) for cubin in cubins]
    names: list[set[str]] = [set() for _ in codes]
    machine = f"SM{arch}" + ("a" if arch >= 90 else "")
    listing = _output_of([knobs.nvidia.nvdisasm.path, "--binary", machine], b"".join(codes)) if codes else ""
    ends = list(itertools.accumulate(map(len, codes)))
    number = 0
    # "/*01f0*/  @!P0 HMMA.16816.F32 R4, …": only the first part of a name counts, for HFMA2.MMA multiplies no matrices.
    for address, name in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?\w+\s+)?([A-Z][A-Z0-9]*)", listing):
        while int(address, 16) >= ends[number]:
            number += 1
        names[number].add(name)
    return names


def _code(cubin: bytes) -> bytes:
    """The machine code in an ELF file: its sections named .text.*"""
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, names = struct.unpack_from("<3H", cubin, 0x3A)
    sections = [struct.unpack_from("<IIQQQQ", cubin, table + index * size) for index in range(count)]
    strings = sections[names][4]
    code = [(start, length) for name, *_, start, length in sections if cubin.startswith(b".text.", strings + name)]
    return b"".join(cubin[start : start + length] for start, length in code)


def _output_of(command: list[str], content: bytes) -> str:
    with tempfile.NamedTemporaryFile() as file:
        file.write(content)
        file.flush()
        return subprocess.run([*command, file.name], capture_output=True, text=True, check=True).stdout
