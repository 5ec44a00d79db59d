"""Builds csrc/ where torch is already installed and a compiler is found; everything else stands in pyproject.toml.

The kernels use torch's stable ABI: no torch headers beyond the stable ones (seconds to compile), one build for every
Python, and for every torch from the version below on. A build that fails leaves a working package in plain PyTorch.
"""

import os
import platform
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

TORCH_TARGET = "0x020b000000000000"  # 2.11
FLAGS = [
    "-O3",
    "-g0",
    "-std=c++17",
    "-ffp-contract=fast",
    "-fvisibility=hidden",
    "-DTORCH_TARGET_VERSION=" + TORCH_TARGET,
]
INSTRUCTION_SETS = {
    "_avx2": ["-mavx2", "-mfma"],
    "_avx512": ["-mavx512f", "-mavx512bw", "-mfma", "-mprefer-vector-width=512"],
}

SANITIZE = os.environ.get("GENREC_SANITIZE")  # such as address,undefined: for tests/csrc


def flags_for(source: str) -> list[str]:
    """One translation unit per instruction set; which one runs is decided on the machine that runs it."""
    for suffix, flags in INSTRUCTION_SETS.items():
        if Path(source).stem.endswith(suffix) and platform.machine() in ("x86_64", "AMD64"):
            return FLAGS + flags
    return FLAGS


def sanitizer_flags() -> list[str]:
    if not SANITIZE:
        return []
    return [f"-fsanitize={SANITIZE}", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g1", "-O1"]


class BuildKernels(build_ext):
    def build_extension(self, ext: Extension) -> None:
        try:
            from torch.utils.cpp_extension import include_paths, library_paths
        except ImportError:
            return self.skip("torch is not installed in the build environment (pip install torch first, then use "
                             "--no-build-isolation)")  # fmt: skip
        try:
            objects = []
            for source in ext.sources:
                objects += self.compiler.compile(
                    [source], output_dir=self.build_temp, include_dirs=include_paths(),
                    extra_postargs=flags_for(source) + sanitizer_flags(), depends=ext.depends,
                )  # fmt: skip
            self.compiler.link_shared_object(
                objects, self.get_ext_fullpath(ext.name), libraries=["torch_cpu"], library_dirs=library_paths(),
                target_lang="c++", build_temp=self.build_temp, extra_postargs=sanitizer_flags(),
            )  # fmt: skip
        except Exception as error:  # whatever a compiler can do wrong, the package works without it
            self.skip(f"csrc/ did not compile ({error})")

    def skip(self, why: str) -> None:
        print(f"genrec: installing in pure PyTorch, without compiled CPU kernels, because {why}.", file=sys.stderr)

    def copy_extensions_to_source(self) -> None:
        """Editable installs build beside the package; there is nothing to copy after a build that was skipped."""
        if all(Path(self.build_lib, self.get_ext_filename(ext.name)).exists() for ext in self.extensions):
            super().copy_extensions_to_source()


setup(
    ext_modules=[
        Extension(
            "genrec._C",
            sources=sorted(str(path) for path in Path("csrc/cpu").glob("*.cpp")),
            depends=sorted(str(path) for path in Path("csrc/cpu").glob("*.h")),
            language="c++",
            py_limited_api=True,
        )
    ],
    cmdclass={"build_ext": BuildKernels},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
