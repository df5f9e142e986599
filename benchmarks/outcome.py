"""A result of the benchmarks: reading and writing it, and what is computed from it.

A result holds facts (the machine, versions, commit, date), notes (what did not run), shapes, and one row for each cell:
what the benchmark said, how many samples it has, and their minimum, fifths and median in seconds. Those of a layer
have their samples too, round by round: all peers of a group were called once in each, so what compares them is taken
within a round.
"""

from __future__ import annotations

import csv
import json
import math
import re
import statistics
from collections import defaultdict
from collections.abc import Iterator, Sequence
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

    def of_kind(self, kind: str) -> list[dict]:
        return [row for row in self.rows if row["kind"] == kind]

    def others(self) -> dict[str, list[dict]]:
        """The rows of every kind of benchmark that has no section of its own."""
        kinds = dict.fromkeys(row["kind"] for row in self.rows)
        return {kind: self.of_kind(kind) for kind in kinds if kind not in ("layer", "planner")}

    def shape(self, name: str) -> Shape:
        return Shape(**self.shapes[name]["shape"])


# ---- files


def load(paths: list[Path]) -> Result:
    result = Result({}, [], {}, [])
    for path in paths:
        raw = json.loads(path.read_text())
        facts = raw.get("facts", {})
        for what in ("device", "torch", "commit"):
            if result.facts and facts[what] != result.facts[what]:
                raise SystemExit(f"{path}: {what} is {facts[what]}, of the files before {result.facts[what]}")
        if result.facts and facts.get("command") not in result.facts["command"].split("; "):
            result.facts["command"] += f"; {facts['command']}"
        result.facts = result.facts or facts
        result.notes += [note for note in raw.get("notes", []) if note not in result.notes]
        result.shapes |= raw.get("shapes", {})
        rows = [row_of(bench, result.shapes) if "stats" in bench else bench for bench in raw["benchmarks"]]
        before = set(result.groups()) | set(result.groups(sweeps=True))
        result.rows += rows
        for row in (row for row in rows if row["kind"] == "layer"):
            key = row["name"], row["dtype"], row["way"], row["clock"]
            if key in before:
                raise SystemExit(
                    f"{path}: {', '.join(key)} is in a file before it too, and peers are compared by round"
                )
            if "rounds" not in row:
                raise SystemExit(f"{path}: {', '.join(key)} has no rounds to compare peers by; measure it again")
    return result


def row_of(bench: dict, shapes: dict[str, dict]) -> dict:
    """What is kept of one of pytest-benchmark's entries; what belongs to its shape goes into ``shapes``."""
    said, stats = dict(bench["extra_info"]), bench["stats"]
    said.setdefault("kind", "other")
    if said["kind"] == "layer":
        shapes[said["name"]] = {key: said.pop(key) for key in OF_SHAPE}
    times = {key: float(f"{stats[key]:.6g}") for key in ("min", "p20", "median", "p80")}
    rounds = {"rounds": [float(f"{time:.6g}") for time in said.pop("rounds")]} if "rounds" in said else {}
    return {**said, "n": stats["rounds"], **times, **rounds}


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
    """A median, and the bounds that it lies between with a certainty of 95 %."""

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


def rounds(group: Group, *names: str) -> Iterator[tuple[float, ...]]:
    """What these peers took, round by round."""
    return zip(*(group[name]["rounds"] for name in names), strict=True)


def ratio(group: Group, peer: str) -> Estimate | None:
    """How many times as long a peer takes as we do."""
    if not {peer, OURS} <= set(group):
        return None
    return estimate([theirs / ours for theirs, ours in rounds(group, peer, OURS)])


def adapter(group: Group, peer: str) -> float | None:
    """A peer's time less that of the frozen layer, where more than the spread is left of it."""
    if not {peer, "base"} <= set(group):
        return None
    left = statistics.median(whole - base for whole, base in rounds(group, peer, "base"))
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


class Aim(NamedTuple):
    cell: tuple
    what: str  # is compared
    aim: float
    reached: float
    surely_missed: bool  # by the whole of the 95 % interval


def aims(result: Result) -> list[Aim]:
    found = []
    for key, group in result.groups().items():
        name, _, way, clock = key
        shape = result.shape(name)
        if clock == "graph" and any(shape.aims):
            aim = dict(zip(WAYS, (*shape.aims, 1.0), strict=True))[way]
            if reached := ratio(group, "eager"):
                found.append(Aim(key, "layer against eager", aim, reached.value, reached.high < aim))
        elif clock == "wall" and not any(shape.aims) and way != "backward":
            if reached := ratio(group, "aten"):
                found.append(Aim(key, "layer against aten", 1 / SLOWER, reached.value, reached.high * SLOWER < 1))
            if (aim := adapter_aim(shape)) and (times := adapter_ratio(group)):
                ahead = [
                    (eager - base) - aim * (ours - base) for eager, ours, base in rounds(group, "eager", OURS, "base")
                ]
                found.append(Aim(key, "adapter against eager's", aim, times, estimate(ahead).high < 0))
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
