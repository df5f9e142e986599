"""Print the root of a CUDA toolkit, as nvcc itself sees it; --fetch gets one by pip where there is none.

Looked for in CUDA_HOME, on PATH and in /usr/local/cuda. The fetched one is what compiling needs and no more: five
packages, about 270 MB, under build/.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FETCHED = ROOT / "build/toolkit"
PACKAGES = ["nvcc==13.0.88", "crt==13.0.88", "runtime==13.0.88", "cccl==13.0.85"]


def root_of(nvcc: str) -> Path:
    """Where an nvcc keeps its toolkit: a link or a script on PATH may lie anywhere."""
    said = subprocess.run([nvcc, "--dryrun", "x.cu"], capture_output=True, text=True).stderr
    top = re.search(r"^#\$ TOP=(.*)$", said, re.MULTILINE)
    if top is None:
        raise SystemExit(f"{nvcc} is no working nvcc: {said.strip()}")
    return Path(top[1].strip('"')).resolve()


def find() -> Path | None:
    named = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    for place in [*named, None, "/usr/local/cuda", FETCHED / "nvidia/cu13"]:
        nvcc = shutil.which("nvcc", path=place and f"{place}/bin")
        if nvcc:
            return root_of(nvcc)
        if place in named:
            raise SystemExit(f"no nvcc in {place}/bin, which CUDA_HOME or CUDA_PATH names")
    return None


def fetch() -> None:
    names = [f"nvidia-cuda-{name}" for name in PACKAGES] + ["nvidia-nvvm==13.0.88"]
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(FETCHED), *names]
    subprocess.run(pip, check=True, stdout=sys.stderr)
    home = FETCHED / "nvidia/cu13"
    # Where a toolkit has them: the linker's folder, and libcudart without its version.
    (home / "lib64").symlink_to("lib")
    (home / "lib/libcudart.so").symlink_to("libcudart.so.13")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fetch", action="store_true")
    if parser.parse_args().fetch and find() is None:
        fetch()
    home = find()
    if home is None:
        raise SystemExit("no CUDA toolkit: nvcc is not on PATH, and CUDA_HOME is not set; --fetch gets one")
    print(home)


if __name__ == "__main__":
    main()
