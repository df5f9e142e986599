"""Break the kernels one by one, and see whether their tests notice.

    python tools/mutate.py               every mutant of tools/mutants.py
    python tools/mutate.py grad_output   those whose name or file holds one of these words
    python tools/mutate.py --check       only that each of them still is what the source says, once (`make lint`)

A mutant is a change of the source that a wrong kernel could have had: a term, a mask, a bound, a factor or a barrier
left out. The kernels it touches are compiled for the emulator again, and the C++ tests run until one fails: killed. A
mutant that none of them notices survives, is listed, and makes this exit with 1. So does a source that fails unmutated.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from mutants import MUTANTS

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "build" / "mutate"
FLAGS = ["-std=c++20", "-O1", "-fno-strict-aliasing"]
TEST_SECONDS = 300  # a mutant may loop for ever


@dataclass(frozen=True)
class Result:
    name: str
    killed_by: str  # empty: survived
    seconds: float


def mutated(source: str, name: str, file: str, old: str, new: str) -> str:
    """``source`` with its one ``old`` replaced."""
    found = source.count(old)
    if found != 1:
        raise SystemExit(f"mutant {name!r}: {file} has {found} times, not once:\n{old}")
    return source.replace(old, new)


def check() -> None:
    names = [name for name, *_ in MUTANTS]
    if len(set(names)) != len(names):
        raise SystemExit("two mutants have one name")
    for name, file, old, new in MUTANTS:
        mutated((ROOT / "csrc" / "kernels" / file).read_text(), name, file, old, new)
    print(f"{len(MUTANTS)} mutants apply")


class Build:
    """Objects of the source as it is, and of a mutant: kernels as C++ for the emulator, the CPU path and the tests."""

    def __init__(self, jobs: int) -> None:
        self.jobs = jobs
        self.kernels = sorted(path.stem for path in (ROOT / "csrc" / "kernels").glob("*.cu"))
        self.tests = sorted(path.stem for path in (ROOT / "tests" / "kernels").glob("test_cuda_*.cpp"))
        self.objects = WORK / "objects"
        shutil.rmtree(WORK, ignore_errors=True)
        self.objects.mkdir(parents=True)
        for kernel in self.kernels:
            (WORK / f"{kernel}.cpp").write_text(f'#include "kernels/{kernel}.cu"\n')
        sources = [WORK / f"{kernel}.cpp" for kernel in self.kernels]
        sources += sorted((ROOT / "csrc" / "cpu").glob("*.cpp"))
        sources += [ROOT / "tests" / "kernels" / f"{test}.cpp" for test in self.tests]
        self.compile(sources, ROOT / "csrc", self.objects)

    def object_of(self, source: Path, folder: Path) -> Path:
        return folder / f"{source.parent.name}_{source.stem}.o"

    def compile(self, sources: list[Path], include: Path, folder: Path) -> None:
        def one(source: Path) -> None:
            command = ["g++", *FLAGS, f"-I{include}", f"-I{ROOT / 'tests' / 'kernels'}", "-MMD"]
            command += ["-c", str(source), "-o", str(self.object_of(source, folder))]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"{source} does not compile:\n{done.stderr[-3000:]}")

        with concurrent.futures.ThreadPoolExecutor(self.jobs) as pool:
            list(pool.map(one, sources))

    def kernels_with(self, file: str) -> list[str]:
        """Those that include ``file``, by what the compiler noted."""
        path = f"csrc/kernels/{file}"
        found = []
        for kernel in self.kernels:
            notes = self.object_of(WORK / f"{kernel}.cpp", self.objects).with_suffix(".d").read_text()
            if path in notes:
                found.append(kernel)
        return found

    def symbols(self, source: Path, kind: str) -> set[str]:
        """Of its object, those it defines ("T") or needs ("U")."""
        command = ["nm", "-C", str(self.object_of(source, self.objects))]
        lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
        return {line.split(f" {kind} ", 1)[1] for line in lines if f" {kind} " in line}

    def tests_of(self, changed: list[str]) -> list[str]:
        """The tests that run one of the ``changed`` kernels, a kernel's own before the whole layer's."""
        defined = {k: self.symbols(WORK / f"{k}.cpp", "T") for k in self.kernels}
        needed = {k: self.symbols(WORK / f"{k}.cpp", "U") for k in self.kernels}
        used = {}
        for test in self.tests:
            wanted, mine = self.symbols(ROOT / "tests" / "kernels" / f"{test}.cpp", "U"), set()
            while more := {k for k in self.kernels if k not in mine and wanted & defined[k]}:
                mine |= more
                wanted = wanted.union(*(needed[k] for k in more))
            used[test] = mine
        return sorted((t for t in self.tests if used[t] & set(changed)), key=lambda t: len(used[t]))

    def first_failure(self, changed: list[str], folder: Path) -> str:
        """The first test that fails with the ``changed`` kernels from ``folder``; empty if none does."""
        cpu = [self.object_of(s, self.objects) for s in sorted((ROOT / "csrc" / "cpu").glob("*.cpp"))]
        kernels = [self.object_of(WORK / f"{k}.cpp", folder if k in changed else self.objects) for k in self.kernels]

        for test in self.tests_of(changed or self.kernels):
            binary = folder / test
            object_of_test = self.object_of(ROOT / "tests" / "kernels" / f"{test}.cpp", self.objects)
            command = ["g++", "-o", str(binary), str(object_of_test), *map(str, kernels + cpu), "-lpthread"]
            subprocess.run(command, check=True)
            try:
                done = subprocess.run([binary], capture_output=True, text=True, timeout=TEST_SECONDS)
            except subprocess.TimeoutExpired:
                return f"{test}: no end"
            if done.returncode:
                said = (done.stderr or done.stdout).strip().splitlines()
                return f"{test}: {said[-1][:160] if said else f'exit status {done.returncode}'}"
        return ""


def run(build: Build, name: str, file: str, old: str, new: str) -> Result:
    begin = time.monotonic()
    folder = WORK / name.replace(" ", "_").replace("/", "_")
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    target = folder / "csrc" / "kernels" / file
    target.write_text(mutated(target.read_text(), name, file, old, new))
    changed = build.kernels_with(file)
    if not changed:
        raise SystemExit(f"mutant {name!r}: no kernel includes {file}")
    build.compile([WORK / f"{kernel}.cpp" for kernel in changed], folder / "csrc", folder)
    killed_by = build.first_failure(changed, folder)
    shutil.rmtree(folder)
    return Result(name, killed_by, time.monotonic() - begin)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="only mutants with one of these in their name or file")
    parser.add_argument("--check", action="store_true", help="only whether every mutant still applies")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()
    check()
    if arguments.check:
        return 0
    chosen = [m for m in MUTANTS if not arguments.words or any(w in m[0] or w in m[1] for w in arguments.words)]
    if not chosen:
        raise SystemExit(f"no mutant with {' or '.join(arguments.words)}")
    build = Build(arguments.jobs)
    found = build.first_failure([], build.objects)
    if found:
        raise SystemExit(f"the source fails as it is: {found}")
    survivors = []
    for i, mutant in enumerate(chosen, 1):
        result = run(build, *mutant)
        print(
            f"[{i}/{len(chosen)}] {result.name}: {result.killed_by or 'SURVIVED'} ({result.seconds:.0f} s)", flush=True
        )
        if not result.killed_by:
            survivors.append(result.name)
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} killed; survivors: {', '.join(survivors) or 'none'}")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
