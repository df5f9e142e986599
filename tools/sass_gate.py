"""Holds the machine code of the kernels to what it must contain on every architecture.

A wrapper of an instruction that compiles to nothing leaves a kernel that builds, loads and is wrong, and only the
machine code shows it. So each kernel that GATES names has its instructions on every architecture, and the first of
these has PTX beside it, for the GPUs that are none of them.
"""

import argparse
import itertools
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from ptxas_report import COMMAND, ROOT, in_order, short_names

ARCHS = ["sm_80", "sm_86", "sm_89", "sm_90a", "sm_100", "sm_120"]
PTX = "sm_80"  # whose instructions are all that the kernels have
KINDS = {
    "tensor-core": re.compile(r"\w*[HG]MMA\b"),
    "asynchronous copy": re.compile(r"LDGSTS\b"),
    "16-byte store": re.compile(r"STG\.E(\.\w+)*\.128\b"),
}
GATES = {
    r"down_route_kernel<(bfloat16|half),": ["tensor-core", "asynchronous copy"],
    r"up_project_kernel<(bfloat16|half)>": ["tensor-core", "asynchronous copy", "16-byte store"],
    r"(^|:)route_kernel<(bfloat16|half),": ["tensor-core"],
    r"gram_kernel<\w+, true>": ["tensor-core"],
    r"grad_output_kernel<(bfloat16|half),": ["tensor-core", "asynchronous copy"],
    r"route_grad_kernel<(bfloat16|half),": ["tensor-core"],
    r"grad_input_kernel<(bfloat16|half),": ["tensor-core", "asynchronous copy", "16-byte store"],
}

Counts = dict[tuple[str, str], Counter]  # by kernel and architecture


def cuobjdump(*args: str) -> str:
    """What cuobjdump says; it is not in every toolkit, and its helper nvdisasm must be of the same release."""
    package = Path(sysconfig.get_path("purelib"), "nvidia/cu13/bin")
    path = os.pathsep.join([str(package), os.environ["PATH"], "/usr/local/cuda/bin"])
    found = shutil.which("cuobjdump", path=path)
    if found is None:
        raise SystemExit("no cuobjdump: pip install '.[disassembler]', or put a toolkit that has it on PATH")
    run = subprocess.run([found, *args], capture_output=True, text=True, env={**os.environ, "PATH": path})
    if run.returncode:
        raise SystemExit(f"{found} {' '.join(args)}: {run.stderr.strip()}")
    return run.stdout


def count(sass: str) -> Counts:
    """How many instructions of each wanted kind, and how many in all, a kernel has."""
    found: Counts = {}
    arch, here = "", Counter()
    for line in sass.splitlines():
        if match := re.match(r"arch = (\S+)", line):
            arch = match[1]
        elif match := re.match(r"\s*Function : (\S+)", line):
            here = found.setdefault((match[1], arch), Counter())
        elif match := re.match(r"\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", line):
            here["all"] += 1
            here.update(kind for kind, pattern in KINDS.items() if pattern.match(match[1]))
    names = short_names(sorted({mangled for mangled, _ in found}))
    return {(names[mangled], arch): counts for (mangled, arch), counts in found.items()}


def counts_on(arch: str, library: Path) -> Counts:
    return count(cuobjdump("-sass", "-arch", arch, str(library)))


def problems(counts: Counts) -> Iterator[str]:
    kernels = sorted({kernel for kernel, _ in counts}, key=lambda kernel: in_order((kernel,)))
    for pattern, kinds in GATES.items():
        mine = [kernel for kernel in kernels if re.match(pattern, kernel)]
        if not mine:
            yield f"no kernel {pattern}"
        for kernel, arch, kind in itertools.product(mine, ARCHS, kinds):
            if not counts.get((kernel, arch), Counter())[kind]:
                yield f"{kernel} on {arch}: no {kind} instruction"


def show(counts: Counts) -> None:
    """Sums over the instantiations of a kernel."""
    print(f"{'instructions':44}" + "".join(f"{arch:>9}" for arch in ARCHS))
    sums: dict[tuple[str, str], Counter] = {}
    for (kernel, arch), found in counts.items():
        sums.setdefault((kernel.split("<")[0], arch), Counter()).update(found)
    for name in sorted({name for name, _ in sums}):
        for kind in ("all", *KINDS):
            mine = [sums.get((name, arch), Counter())[kind] for arch in ARCHS]
            if any(mine):
                print(f"{name if kind == 'all' else '':24}{kind:20}" + "".join(f"{number:9}" for number in mine))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = ROOT / "build/cmake/librouted_peft_cuda.a"
    parser.add_argument("library", type=Path, nargs="?", default=default, help="with the kernels' objects")
    library = parser.parse_args().library
    if not library.exists():
        raise SystemExit(f"no {library}: build with nvcc first ({COMMAND})")
    counts: Counts = {}
    with ProcessPoolExecutor(os.cpu_count()) as processes:  # reading the text takes as long as its making
        for found in processes.map(counts_on, ARCHS, itertools.repeat(library)):
            counts |= found
    show(counts)
    missing = list(problems(counts))
    ptx = set(re.findall(r"^\.target (\w+)", cuobjdump("-ptx", str(library)), re.MULTILINE))
    print(f"PTX: {', '.join(sorted(ptx)) or 'none'}")
    if ptx != {PTX}:
        missing.append(f"PTX for {sorted(ptx)}, and it must be for {PTX} alone: other GPUs run nothing else")
    for problem in missing:
        print(problem, file=sys.stderr)
    sys.exit(bool(missing))


if __name__ == "__main__":
    main()
