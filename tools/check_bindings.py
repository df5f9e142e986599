"""Compile csrc/torch as a build with CUDA does, without building it: the installed torch need not have CUDA."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pybind11
from torch.utils.cpp_extension import include_paths

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ["module.cpp", "call.cpp", "ops.cpp", "ops_cuda.cpp"]


def main() -> None:
    cuda = Path(os.environ["CUDA_HOME"], "include")
    foreign = [pybind11.get_include(), *include_paths(), sysconfig.get_path("include"), str(cuda)]
    flags = "-std=c++20 -DUSE_CUDA -DTORCH_TARGET_VERSION=0x020b000000000000 -fvisibility=hidden -Wall -Wextra -Werror"
    compiler = [os.environ.get("CXX", "g++"), "-fsyntax-only", *flags.split(), "-I", str(ROOT / "csrc")]
    for path in foreign:
        compiler += ["-isystem", path]
    failed = [name for name in SOURCES if subprocess.run([*compiler, str(ROOT / "csrc/torch" / name)]).returncode]
    if failed:
        sys.exit(f"does not compile with CUDA: {', '.join(failed)}")
    print(f"compile with CUDA: {', '.join(SOURCES)}")


if __name__ == "__main__":
    main()
