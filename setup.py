"""Builds csrc/ where torch is already installed and a compiler is found; everything else stands in pyproject.toml.

The kernels use torch's stable ABI: no torch headers beyond the stable ones, one build for every Python, and for every
torch from the version below on. A build that fails leaves a working package in plain PyTorch.
"""

import os
import platform
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

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
SANITIZERS = os.environ.get("GENREC_SANITIZERS")  # such as address,undefined: slow kernels that check themselves
if SANITIZERS:  # without the checks that multiply the code of unrolled loops; address sees what they would see
    FLAGS += ["-O1", "-g1", f"-fsanitize={SANITIZERS}", "-fno-sanitize=null,object-size,pointer-overflow,vptr"]
    FLAGS += ["-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]
    FLAGS += ["-fno-wrapv"]  # Python's own flags may define what overflows, and nothing would be found
SOURCES = sorted(str(path) for path in Path("csrc/cpu").glob("*.cpp"))
if SANITIZERS == "thread":  # which cannot follow the threads that torch starts
    SOURCES.append("csrc/tests/threads.cpp")


def flags_for(source: str) -> list[str]:
    """One translation unit per instruction set; which one runs is decided on the machine that runs it."""
    for suffix, flags in INSTRUCTION_SETS.items():
        if Path(source).stem.endswith(suffix) and platform.machine() in ("x86_64", "AMD64"):
            return FLAGS + flags
    return FLAGS


class BuildKernels(build_ext):
    def build_extension(self, ext: Extension) -> None:
        try:
            from torch.utils.cpp_extension import include_paths, library_paths
        except ImportError:
            return self.skip("torch is not installed in the build environment (pip install torch first, then use "
                             "--no-build-isolation)")  # fmt: skip
        try:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                objects = pool.map(partial(self.compile_source, ext, include_paths()), ext.sources)
            self.compiler.link_shared_object(
                list(objects), self.get_ext_fullpath(ext.name), libraries=["torch_cpu"], library_dirs=library_paths(),
                target_lang="c++", build_temp=self.build_temp,
                extra_postargs=[f"-fsanitize={SANITIZERS}"] if SANITIZERS else [],
            )  # fmt: skip
        except Exception as error:  # whatever a compiler can do wrong, the package works without it
            self.skip(f"csrc/ did not compile ({error})")

    def compile_source(self, ext: Extension, include_dirs: list[str], source: str) -> str:
        return self.compiler.compile(
            [source], output_dir=self.build_temp, include_dirs=include_dirs,
            extra_postargs=flags_for(source), depends=ext.depends,
        )[0]  # fmt: skip

    def skip(self, why: str) -> None:
        print(f"genrec: installing in pure PyTorch, without compiled CPU kernels, because {why}.", file=sys.stderr)

    def copy_extensions_to_source(self) -> None:
        """Editable installs build beside the package; there is nothing to copy after a build that was skipped."""
        if all(Path(self.build_lib, self.get_ext_filename(ext.name)).exists() for ext in self.extensions):
            super().copy_extensions_to_source()


class BuildPackage(build_py):
    def run(self) -> None:
        """The package, with the sources of the TensorRT plugins: whoever installs a wheel builds them for a model."""
        super().run()
        if not self.editable_mode:
            shutil.copytree("csrc/tensorrt", Path(self.build_lib, "genrec", "export", "csrc"), dirs_exist_ok=True)


setup(
    ext_modules=[
        Extension(
            "genrec._C",
            sources=SOURCES,
            depends=sorted(str(path) for path in Path("csrc/cpu").glob("*.h")),
            language="c++",
            py_limited_api=True,
        )
    ],
    cmdclass={"build_ext": BuildKernels, "build_py": BuildPackage},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
