"""A result of the benchmarks: reading and writing it, and what is computed from it.

A result holds facts (the machine, versions, commit, date), notes (what did not run), shapes, and one row for each cell:
what the benchmark said, how many samples it has, and their minimum, fifths and median in seconds. Those of a layer
have their samples too, by run and round. All peers of a group were called once in each round, so what compares them is
taken within one. A run is a process: where its memory lies, and what speed the machine has in those minutes, moves a
ratio by several per cent for all of its rounds, so what several runs say is told by their medians.
"""

from __future__ import annotations

import csv
import json
import math
import re
import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from model import WAYS
from shapes import Shape

OURS = "routed_peft"
OF_SHAPE = ("shape", "family", "text", "tokens", "M", "R")  # kept once for all rows
OFF = 1.05  # a choice of the planner's that takes so much longer than another one is a bad one
SLOWER = 1.03  # above that, and not before, a cell counts as slower
Group = dict[str, dict]  # a row for each peer, measured in turns


@dataclass
class Result:
    facts: dict
    notes: list[str]
    shapes: dict[str, dict]
    rows: list[dict]

    @property
    def name(self) -> str:
        words = [self.facts["device"], self.facts["date"], self.facts["commit"]]
        return "-".join(re.sub(r"[^a-z0-9]+", "-", word.lower()).strip("-") for word in words)

    def groups(self, sweeps: bool = False) -> dict[tuple[str, str, str, str], Group]:
        """By shape, dtype, way and clock."""
        found: dict[tuple, Group] = defaultdict(dict)
        for row in self.rows:
            if row["kind"] == "layer" and self.shapes[row["name"]]["family"].startswith("sweep") == sweeps:
                found[row["name"], row["dtype"], row["way"], row["clock"]][row["peer"]] = row
        return dict(found)

    def every_group(self) -> dict[tuple[str, str, str, str], Group]:
        return self.groups() | self.groups(sweeps=True)

    @property
    def samples(self) -> tuple[int, str]:
        """What the median of a ratio is taken of, at least: how many, and of what."""
        runs = [row["runs"] for group in self.groups().values() for row in group.values()]
        several = min(len(mine) for mine in runs)
        return (several, "runs") if several > 1 else (min(len(mine[0]) for mine in runs), "rounds")

    def of_kind(self, kind: str) -> list[dict]:
        return [row for row in self.rows if row["kind"] == kind]

    def others(self) -> dict[str, list[dict]]:
        """The rows of every kind of benchmark that has no section of its own."""
        kinds = dict.fromkeys(row["kind"] for row in self.rows)
        return {kind: self.of_kind(kind) for kind in kinds if kind not in ("layer", "planner")}

    def shape(self, name: str) -> Shape:
        return Shape(**self.shapes[name]["shape"])


# ---- files

RATES = ("copy bandwidth, GB/s", "products, GFLOP/s")  # facts of the machine that every run measures


def load(paths: list[Path]) -> Result:
    result, said = Result({}, [], {}, []), []
    for path in paths:
        raw = json.loads(path.read_text())
        part = Result({}, [], raw.get("shapes", {}), [])
        facts = raw.get("facts", {})
        for what in ("device", "processor", "instruction set", "threads", "size", "torch", "commit"):
            if result.facts and facts.get(what) != result.facts.get(what):
                raise SystemExit(f"{path}: {what} is {facts.get(what)}, of the files before {result.facts.get(what)}")
        if result.facts and facts.get("command") not in result.facts["command"].split("; "):
            result.facts["command"] += f"; {facts['command']}"
        result.facts = result.facts or facts
        said.append(facts)
        result.notes += [note for note in raw.get("notes", []) if note not in result.notes]
        part.rows = [row_of(bench, part.shapes) if "stats" in bench else bench for bench in raw["benchmarks"]]
        result.shapes |= part.shapes
        known, cells = result.every_group(), [cell_of(row) for row in part.of_kind("layer")]
        if len({*cells}) < len(cells):
            raise SystemExit(f"{path}: a cell is there twice; give each run a file of its own")
        result.rows += [row for row in part.rows if row["kind"] != "layer"]
        for key, group in part.every_group().items():
            if any("runs" not in row for row in group.values()):
                raise SystemExit(f"{path}: {', '.join(key)} has no rounds to compare peers by; measure it again")
            if key not in known:
                result.rows += group.values()
            elif set(known[key]) != set(group):
                raise SystemExit(
                    f"{path}: {', '.join(key)} was run with {', '.join(group)}, in a file before it with "
                    f"{', '.join(known[key])}; peers are compared within a run"
                )
            else:
                for peer, row in group.items():
                    known[key][peer]["runs"] += row["runs"]
    for row in result.of_kind("layer"):
        row |= spread([time for run in row["runs"] for time in run])
    for rate in RATES:
        result.facts |= {rate: middle([facts[rate] for facts in said if rate in facts])} if rate in result.facts else {}
    return result


def middle(values: list) -> float | dict:
    """The median of numbers, or of each number in dicts."""
    if not isinstance(values[0], dict):
        return round(statistics.median(values), 1)
    return {key: middle([value[key] for value in values if key in value]) for key in values[0]}


def cell_of(row: dict) -> tuple[str, ...]:
    return tuple(row[key] for key in ("name", "dtype", "way", "clock", "peer"))


def row_of(bench: dict, shapes: dict[str, dict]) -> dict:
    """What is kept of one of pytest-benchmark's entries; what belongs to its shape goes into ``shapes``."""
    said, stats = dict(bench["extra_info"]), bench["stats"]
    said.setdefault("kind", "other")
    if said["kind"] == "layer":
        shapes[said["name"]] = {key: said.pop(key) for key in OF_SHAPE}
    times = {key: float(f"{stats[key]:.6g}") for key in ("min", "p20", "median", "p80")}
    runs = {"runs": [[float(f"{time:.6g}") for time in said.pop("rounds")]]} if "rounds" in said else {}
    return {**said, "n": stats["rounds"], **times, **runs}


def spread(times: Sequence[float]) -> dict[str, float]:
    fifths = statistics.quantiles(times, n=5, method="inclusive") if len(times) > 1 else [*times] * 4
    said = {"min": min(times), "p20": fifths[0], "median": statistics.median(times), "p80": fifths[3]}
    return {"n": len(times)} | {key: float(f"{value:.6g}") for key, value in said.items()}


def write_json(result: Result, path: Path) -> None:
    """With a line for each row, so that a change of one is a change of one line."""
    head = json.dumps({"facts": result.facts, "notes": result.notes}, indent=1)[:-2]
    shapes = ",\n".join(f"  {json.dumps(name)}: {json.dumps(shape)}" for name, shape in result.shapes.items())
    rows = ",\n".join(f"  {json.dumps(row)}" for row in result.rows)
    path.write_text(f'{head},\n "shapes": {{\n{shapes}\n }},\n "benchmarks": [\n{rows}\n ]\n}}\n')


def write_csv(result: Result, path: Path) -> None:
    scalars = [{k: v for k, v in row.items() if not isinstance(v, dict | list)} for row in result.rows]
    for row in scalars:
        if row["kind"] == "layer":
            row |= {key: value for key, value in result.shapes[row["name"]].items() if key != "shape"}
    columns = list(dict.fromkeys(key for row in scalars for key in row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(scalars)


# ---- numbers


class Estimate(NamedTuple):
    """A median, and the bounds that it lies between (`certainty`)."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f} ({self.low:.2f}–{self.high:.2f})"


def estimate(samples: Sequence[float]) -> Estimate:
    """Of any distribution: the bounds are two of the samples, each with so many beyond it that the true median is
    there with a probability of 2.5 % at most (of fewer than six samples the outermost, with more)."""
    ordered, n = sorted(samples), len(samples)
    beyond, tail = 0, 2.0**-n
    while tail <= 0.025:
        beyond += 1
        tail += math.comb(n, beyond) * 2.0**-n
    outer = max(beyond - 1, 0)
    return Estimate(statistics.median(ordered), ordered[outer], ordered[n - 1 - outer])


def certainty(samples: int) -> float:
    """That an estimate's bounds hold the median: 95 % and more from six samples on."""
    return min(0.95, 1 - 2.0 ** (1 - samples))


def compare(group: Group, *names: str, by: Callable[..., float]) -> Estimate:
    """What ``by`` makes of the times of these peers in a round: of the rounds of one run, or of several runs, for each
    of which its median stands."""
    runs = [zip(*run, strict=True) for run in zip(*(group[name]["runs"] for name in names), strict=True)]
    values = [[by(*times) for times in run] for run in runs]
    return estimate(values[0] if len(values) == 1 else [statistics.median(run) for run in values])


def ratio(group: Group, peer: str) -> Estimate | None:
    """How many times as long a peer takes as we do."""
    if not {peer, OURS} <= set(group):
        return None
    return compare(group, peer, OURS, by=lambda theirs, ours: theirs / ours)


def adapter(group: Group, peer: str) -> float | None:
    """A peer's time less that of the frozen layer, where more than the spread is left of it."""
    if not {peer, "base"} <= set(group):
        return None
    left = compare(group, peer, "base", by=lambda whole, base: whole - base).value
    return left if left > 0.005 * group["base"]["median"] else None


def adapter_ratio(group: Group) -> float | None:
    """How many times as long eager's adapter takes as ours; infinite where ours comes free with its base layer."""
    ours, eager = adapter(group, OURS), adapter(group, "eager")
    if not eager or OURS not in group:
        return None
    return eager / ours if ours else math.inf


def lost(result: Result, peer: str) -> dict[tuple, Estimate]:
    """The groups in which we are slower than a peer, the worst first."""
    ratios = {key: ratio(group, peer) for key, group in result.groups().items()}
    slower = {key: times for key, times in ratios.items() if times and times.value * SLOWER < 1}
    return dict(sorted(slower.items(), key=lambda item: item[1]))


def surely(slower: dict[tuple, Estimate]) -> int:
    """In how many of them the whole interval is on that side."""
    return sum(times.high * SLOWER < 1 for times in slower.values())


def perhaps(result: Result, peer: str) -> int:
    """In how many groups the interval reaches to where we are slower, though its middle does not."""
    ratios = [ratio(group, peer) for group in result.groups().values()]
    return sum(times.low * SLOWER < 1 <= times.value * SLOWER for times in ratios if times)


def times_ours(row: dict, rows: list[dict]) -> float | None:
    """How many times as long as ours a row of a kind without rounds to compare takes, by the medians; None of ours."""
    if row.get("peer") in (None, OURS):
        return None
    keys = [key for key in ("form", "routing", "way", "dtype", "device", "size") if key in row]
    like = [other for other in rows if other.get("peer") == OURS and all(other.get(k) == row[k] for k in keys)]
    return row["median"] / like[0]["median"] if len(like) == 1 else None


class Aim(NamedTuple):
    cell: tuple
    what: str  # is compared
    aim: float
    reached: float
    surely_missed: bool  # by all that lies between the bounds


def group_device(group: Group) -> str:
    return next(iter(group.values()))["device"]


def aims(result: Result) -> list[Aim]:
    found = []
    for key, group in result.groups().items():
        name, _, way, clock = key
        shape = result.shape(name)
        if clock == "graph" and any(shape.aims):
            aim = dict(zip(WAYS, (*shape.aims, 1.0), strict=True))[way]
            if reached := ratio(group, "eager"):
                found.append(Aim(key, "layer against eager", aim, reached.value, reached.high < aim))
        elif group_device(group) == "cpu" and not any(shape.aims) and way != "backward":
            if reached := ratio(group, "aten"):
                found.append(Aim(key, "layer against aten", 1 / SLOWER, reached.value, reached.high * SLOWER < 1))
            if (aim := adapter_aim(shape)) and (times := adapter_ratio(group)):

                def ahead(eager: float, ours: float, base: float, aim: float = aim) -> float:
                    return (eager - base) - aim * (ours - base)

                missed = compare(group, "eager", OURS, "base", by=ahead).high < 0
                found.append(Aim(key, "adapter against eager's", aim, times, missed))
    return found


def adapter_aim(shape: Shape) -> float:
    """How much faster than eager's the adapter alone is to be on a CPU (0: no aim)."""
    if shape.tokens < 2048:
        return 1.2
    if shape.rank_one:
        return 4.0
    if shape.dropout:
        return 2.5
    return 1.7 if shape.cached or shape.m <= shape.n else 0.0
