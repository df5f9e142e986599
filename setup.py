"""The C++ extension: the CPU path always, CUDA where torch and a toolkit both have it.

Everything else about the package is in pyproject.toml.
"""

import os
import re
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext as plain_build_ext

TORCH_MINIMUM = (2, 11)  # the stable C++ interface asked for: one binary runs on every later torch

# Sources are listed, never globbed: a stray file must not end up in the binary.
CPU_SOURCES = [
    "csrc/cpu/isa.cpp",
    "csrc/cpu/gemm.cpp",
    "csrc/cpu/condition.cpp",
    "csrc/cpu/route.cpp",
    "csrc/cpu/rank_one.cpp",
    "csrc/cpu/routed.cpp",
    "csrc/cpu/rows.cpp",
]
KERNELS = [
    "pack", "condition", "rank_one", "down_route", "route", "gram", "up_project", "routed",
    "grad_output", "route_grad", "grad_state", "gram_grad", "pooled_grad", "grad_input", "reduce", "rank_one_sweep",
    "rank_one_sum", "rank_one_weights", "rank_one_grad", "routed_grad",
]  # fmt: skip
CUDA_SOURCES = ["csrc/torch/ops_cuda.cpp", *(f"csrc/kernels/{name}.cu" for name in KERNELS)]
SOURCES = ["csrc/torch/module.cpp", "csrc/torch/call.cpp", "csrc/torch/ops.cpp", *CPU_SOURCES]
HEADERS = sorted(str(p) for p in Path("csrc").rglob("*") if p.suffix in {".h", ".cuh", ".inl"})


def why_no_cuda(torch, cuda_home) -> str | None:
    """Why this build leaves CUDA out, or None where it does not; a GPU need not be present."""
    wanted = os.environ.get("ROUTED_PEFT_CUDA", "auto")
    if wanted not in {"0", "1", "auto"}:
        raise SystemExit(f"ROUTED_PEFT_CUDA is 0, 1 or auto, not {wanted!r}")
    if wanted == "0":
        return "ROUTED_PEFT_CUDA=0"
    if torch.version.cuda is None:
        reason = f"torch {torch.__version__} has no CUDA"
    elif cuda_home is None:
        reason = "no CUDA toolkit: nvcc is not on PATH and CUDA_HOME is not set"
    else:
        return None
    if wanted == "1":
        raise SystemExit(f"ROUTED_PEFT_CUDA=1 cannot be done: {reason}")
    return reason


def cuda_archs(torch) -> str:
    """The architectures to build for, as torch's TORCH_CUDA_ARCH_LIST has them.

    Without that variable: this machine's GPUs, or where none will do, every kind that the kernels are written for.
    """
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST", "")
    if old := re.findall(r"\b[1-7]\.\d[^\s;]*|Kepler|Maxwell|Pascal|Volta|Turing", asked):
        raise SystemExit(
            f"TORCH_CUDA_ARCH_LIST={asked!r} asks for {', '.join(old)}, and routed_peft's CUDA kernels need compute "
            "capability 8.0 or newer (ROUTED_PEFT_CUDA=0 builds without them)"
        )
    gpus = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    # Hopper's own instructions are those of 9.0a.
    present = [f"{major}.{minor}{'a' * (major == 9)}" for major, minor in sorted(gpus) if major >= 8]
    return asked or ";".join(present) or "8.0+PTX;8.6;8.9;9.0a;10.0;12.0"


def configure():
    """The extension and the command that builds it, for the torch at hand."""
    import pybind11
    import torch
    from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension

    no_cuda = why_no_cuda(torch, CUDA_HOME)
    archs = None
    if no_cuda is None:
        archs = os.environ["TORCH_CUDA_ARCH_LIST"] = cuda_archs(torch)  # read by torch

    major, minor = TORCH_MINIMUM
    common = ["-O3", "-std=c++20", f"-DTORCH_TARGET_VERSION=0x{major:02x}{minor:02x}000000000000"]
    warnings = ["-Wall", "-Wextra", "-Wno-unused-parameter"]  # the last for torch's own headers
    flags = {"cxx": [*common, "-fvisibility=hidden", *warnings, "-g0"]}
    if no_cuda is None:
        flags["cxx"] += ["-DUSE_CUDA"]
        flags["nvcc"] = [*common, "-DUSE_CUDA", "--threads=2", "-lineinfo"]
    extension = (CppExtension if no_cuda else CUDAExtension)(
        "routed_peft._C",
        SOURCES if no_cuda else SOURCES + CUDA_SOURCES,
        depends=HEADERS,
        # pybind11's own headers before the copy inside torch's: the two never mix.
        include_dirs=[pybind11.get_include(), os.path.abspath("csrc")],
        extra_compile_args=flags,
    )

    class build_ext(BuildExtension):  # named like its command: setuptools goes by that
        def run(self):
            found = str(torch.__version__)
            if tuple(int(part) for part in found.split(".")[:2]) < TORCH_MINIMUM:
                raise SystemExit(f"routed_peft needs torch >= {major}.{minor}, not {found}")
            if os.name == "nt":
                raise SystemExit("routed_peft's C++ is written for g++ and clang, not for MSVC: on Windows, use WSL")
            super().run()
            # Read when the binary does not load, which is when it cannot speak for itself.
            cuda = None if no_cuda else torch.version.cuda
            package = Path("" if self.inplace else self.build_lib, "routed_peft")
            (package / "_built_with.py").write_text(
                '"""What the extension was built with; written by setup.py."""\n\n'
                f"TORCH = {found!r}\nCUDA: str | None = {cuda!r}\nCUDA_ARCHS: str | None = {archs!r}\n"
            )
            print(f"routed_peft: CUDA {f'on ({cuda}; {archs})' if cuda else f'off ({no_cuda})'}")

    return extension, build_ext


def unconfigured(missing: str):
    """What metadata and source distributions need, where there is no torch or pybind11."""

    class build_ext(plain_build_ext):
        def run(self):
            raise SystemExit(f"building routed_peft needs {missing} in this environment")

    return Extension("routed_peft._C", SOURCES, depends=HEADERS), build_ext


try:
    extension, build_ext = configure()
except ModuleNotFoundError as error:
    if error.name not in {"torch", "pybind11"}:
        raise
    extension, build_ext = unconfigured(error.name)

setup(
    ext_modules=[extension],
    cmdclass={"build_ext": build_ext},
    # One place for the objects, editable installs included, so that only what changed is compiled.
    options={"build_ext": {"build_temp": "build/ext"}},
)
