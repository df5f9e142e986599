"""What each kernel costs on each architecture, held against the checked-in table.

Reads the .ptxas files that a build with CMakeLists.txt leaves beside its objects. It fails where a kernel spills, takes
over 8 registers more than the table says (one step of what the hardware hands out) or more stack or static shared
memory, is new or gone, or where there are more kernels than MOST. --update writes the table.
"""

import argparse
import csv
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "tools/ptxas_table.csv"
MOST = 180  # kernels for one architecture: each costs compile time and binary size on all of them
REGISTER_STEP = 8
COMMAND = "make kernel-report"


class Cost(NamedTuple):
    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    smem: int  # static; what a launch asks for is not known here


Costs = dict[tuple[str, str], Cost]  # by kernel and architecture


def short_names(mangled: list[str]) -> dict[str, str]:
    """down_route_kernel<bfloat16, 64, false> for each mangled name."""
    plain = subprocess.run(["c++filt"], input="\n".join(mangled), text=True, capture_output=True, check=True).stdout
    return dict(zip(mangled, map(short_name, plain.splitlines()), strict=True))


def short_name(plain: str) -> str:
    name = re.sub(r"\(anonymous namespace\)::|\(routed_peft::[\w:]+\)(?=\d)|\b[a-z_]\w*::|__nv_(?=bfloat16)", "", plain)
    name = re.sub(r"\b__half\b", "half", name).removeprefix("void ")
    depth = 0
    for i, letter in enumerate(name):  # up to the list of parameters
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0:
            return name[:i]
    return name


def read(folder: Path) -> Costs:
    """Every kernel of a build."""
    found: Costs = {}
    for path in sorted(folder.rglob("*.ptxas")):
        found.update(parse(path.read_text()))
    names = short_names(sorted({mangled for mangled, _ in found}))
    costs = {(names[mangled], arch): cost for (mangled, arch), cost in found.items()}
    if len(costs) != len(found):
        raise SystemExit("two kernels have the same name: the table could not tell them apart")
    if not costs:
        raise SystemExit(f"no kernel in {folder}: build with nvcc first ({COMMAND})")
    return costs


def parse(log: str) -> Iterator[tuple[tuple[str, str], Cost]]:
    key, memory = None, (0, 0, 0)
    for line in log.splitlines():
        if match := re.search(r"Compiling entry function '(\S+)' for '(\S+)'", line):
            key = match[1], match[2]
        elif match := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            memory = int(match[1]), int(match[2]), int(match[3])
        elif key and (match := re.search(r"Used (\d+) registers", line)):
            smem = re.search(r"(\d+) bytes smem", line)
            yield key, Cost(int(match[1]), *memory, int(smem[1]) if smem else 0)
            key = None


def read_table() -> Costs:
    if not TABLE.exists():
        raise SystemExit(f"no {TABLE}: make kernel-report ARGS=--update writes it")
    with TABLE.open(newline="") as file:
        rows = csv.reader(file)
        next(rows)
        return {(kernel, arch): Cost(*map(int, numbers)) for kernel, arch, *numbers in rows}


def write_table(costs: Costs) -> None:
    with TABLE.open("w", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["kernel", "arch", *Cost._fields])
        rows.writerows([*key, *costs[key]] for key in sorted(costs, key=in_order))


def in_order(key: tuple[str, str]) -> tuple:
    """Numbers by their value: sm_90a before sm_100, width 32 before 256."""
    return tuple([int(part) if part.isdigit() else part for part in re.split(r"(\d+)", text)] for text in key)


def problems(costs: Costs, table: Costs) -> Iterator[str]:
    for (kernel, arch), now in sorted(costs.items(), key=lambda item: in_order(item[0])):
        where = f"{kernel} on {arch}"
        if now.spill_stores or now.spill_loads:
            yield f"{where}: spills, {now.spill_stores} bytes stored and {now.spill_loads} loaded"
        before = table.get((kernel, arch))
        if before is None:
            yield f"{where}: not in the table"
            continue
        if now.registers > before.registers + REGISTER_STEP:
            yield f"{where}: {now.registers} registers, {before.registers} in the table"
        for name in ("stack", "smem"):
            if getattr(now, name) > getattr(before, name):
                yield f"{where}: {getattr(now, name)} bytes of {name}, {getattr(before, name)} in the table"
    for kernel, arch in sorted(table.keys() - costs.keys(), key=in_order):
        yield f"{kernel} on {arch}: in the table, and not in the build"


def show(costs: Costs) -> None:
    """Registers by architecture, one line a kernel."""
    archs = sorted({arch for _, arch in costs}, key=lambda arch: in_order((arch,)))
    kernels = sorted({kernel for kernel, _ in costs}, key=lambda kernel: in_order((kernel,)))
    print(f"{'registers':60}" + "".join(f"{arch:>8}" for arch in archs) + "   smem  stack")
    for kernel in kernels:
        mine = [costs.get((kernel, arch)) for arch in archs]
        registers = "".join(f"{cost.registers if cost else '-':>8}" for cost in mine)
        smem, stack = (max(getattr(cost, name) for cost in mine if cost) for name in ("smem", "stack"))
        print(f"{kernel:60}{registers}{smem:7}{stack:7}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", default=ROOT / "build/cmake")
    parser.add_argument("--update", action="store_true", help="write the table")
    args = parser.parse_args()
    costs = read(args.folder)
    show(costs)
    if args.update:
        write_table(costs)
    found = list(problems(costs, read_table()))
    for arch in sorted({arch for _, arch in costs}, key=lambda arch: in_order((arch,))):
        count = sum(on == arch for _, on in costs)
        print(f"{arch}: {count} kernels, at most {MOST}")
        if count > MOST:
            found.append(f"{arch}: {count} kernels, at most {MOST}")
    for problem in found:
        print(problem, file=sys.stderr)
    if found:
        raise SystemExit("where the change means it: make kernel-report ARGS=--update, and say why")


if __name__ == "__main__":
    main()
