"""Build of the CPU extension; everything else about the package is in pyproject.toml."""

import os
import platform
import tempfile
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import setup
from setuptools.errors import CompileError, LinkError

# Each SIMD level is one translation unit with its own flags; which one runs is decided at
# import, so that a wheel built anywhere runs everywhere (no -march=native). No -ffast-math:
# infinities carry meaning here.
X86_LEVELS = {
    "csrc/level_avx2.cpp": ["-mavx2", "-mfma"],
    "csrc/level_avx512.cpp": [
        *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"),
        *("-mavx2", "-mfma", "-mprefer-vector-width=512"),
    ],
}
IS_X86 = platform.machine().lower() in ("x86_64", "amd64")


class BuildExt(build_ext):
    """Adds per-file SIMD flags, and OpenMP where the compiler has it."""

    def build_extensions(self) -> None:
        if self._links_with_openmp():
            for extension in self.extensions:
                extension.extra_compile_args.append("-fopenmp")
                extension.extra_link_args.append("-fopenmp")
        else:
            for extension in self.extensions:
                extension.extra_compile_args.append("-Wno-unknown-pragmas")
        if IS_X86:
            compile_one = self.compiler._compile

            def with_level_flags(obj, src, ext, cc_args, extra_postargs, pp_opts):
                flags = X86_LEVELS.get(Path(src).as_posix(), [])
                compile_one(obj, src, ext, cc_args, [*extra_postargs, *flags], pp_opts)

            self.compiler._compile = with_level_flags
        super().build_extensions()

    def _links_with_openmp(self) -> bool:
        with tempfile.TemporaryDirectory() as folder:
            source = os.path.join(folder, "probe.cpp")
            Path(source).write_text(
                "#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }\n"
            )
            try:
                objects = self.compiler.compile(
                    [source], output_dir=folder, extra_postargs=["-fopenmp"]
                )
                self.compiler.link_executable(
                    objects, os.path.join(folder, "probe"), extra_postargs=["-fopenmp"]
                )
            except (CompileError, LinkError):
                return False
        return True


setup(
    # Listed, not found: a top-level package named "kernels" would overwrite Hugging Face's, and the
    # folders in benchmarks/ are for this repository alone.
    packages=[
        "dotresize",
        "dotresize.ops",
        "dotresize.ot",
        "dotresize.models",
        "dotresize.checkpoint",
        "dotresize.offload",
        "dotresize.calibration",
        "dotresize.narrow",
        "dotresize.merging",
        "dotresize.baselines",
        "dotresize.cli",
        "dotresize.kernels",
        "dotresize.benchmarks",
    ],
    package_dir={
        "dotresize": "dotresize",
        "dotresize.kernels": "kernels",
        "dotresize.benchmarks": "benchmarks",
    },
    package_data={"dotresize": ["py.typed", "*.pyi"]},
    ext_modules=[
        Pybind11Extension(
            "dotresize._cpp",
            sorted(str(path) for path in Path("csrc").glob("*.cpp")),
            depends=sorted(str(path) for path in Path("csrc").glob("*.hpp")),
            cxx_std=17,
            extra_compile_args=["-O3", "-fno-math-errno", "-Wall"],
        )
    ],
    cmdclass={"build_ext": BuildExt},
)
