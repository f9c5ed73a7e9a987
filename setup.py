"""The native kernels, compiled once for each level of processor; all else is in pyproject.toml.

A library of its own for each, since code that the compiler shares between files (templates of the standard library)
would otherwise be merged between levels. Optional: where one does not compile, `server/kernels/__init__.py` does
without it.
"""

import copy
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

_LEVELS = {
    "avx2": ["-march=x86-64-v3"],
    "avx512": ["-march=x86-64-v4"],
    "avx512_bf16": ["-march=x86-64-v4", "-mavx512bf16"],
    "amx": ["-march=x86-64-v4", "-mavx512bf16", "-mamx-tile", "-mamx-bf16"],
}
# Products and sums are fused where the source says so and nowhere else, so that no two ways through it differ.
_FLAGS = ["-O3", "-std=c++17", "-ffp-contract=off", "-pthread", "-fvisibility=hidden", "-Wno-maybe-uninitialized"]
_FOLDER = Path("server/kernels")


class LevelsAtOnce(build_ext):
    """Levels are compiled side by side, so each has a folder of its own for the objects of the same sources."""

    def build_extension(self, ext: Extension) -> None:
        own = copy.copy(self)
        own.build_temp = f"{self.build_temp}/{ext.name}"
        build_ext.build_extension(own, ext)


setup(
    cmdclass={"build_ext": LevelsAtOnce},
    options={"build_ext": {"parallel": True}},
    ext_modules=[
        Extension(
            f"server.kernels._native_{level}",
            sources=sorted(map(str, _FOLDER.glob("*.cpp"))),
            depends=sorted(map(str, _FOLDER.glob("*.h"))),
            extra_compile_args=[*_FLAGS, *flags],
            extra_link_args=["-pthread"],
            optional=True,
        )
        for level, flags in _LEVELS.items()
    ],
)
