"""A result of the benchmarks: reading and writing it, and what is computed from it.

A result holds facts (the machine, versions, commit, date), notes (what did not run), shapes, and one row for each cell:
what the benchmark said, how many samples it has, and their minimum, fifths and median in seconds.
"""

from __future__ import annotations

import csv
import json
import math
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from model import WAYS
from shapes import Shape

OURS = "routed_peft"
OF_SHAPE = ("shape", "family", "text", "tokens", "M", "R")  # kept once for all rows
OFF = 1.05  # a choice of the planner's that takes so much longer than another one is a bad one
SLOWER = 1.03  # above that, and not before, a cell counts as slower: less is the spread of a median
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
        for bench in raw["benchmarks"]:
            result.rows.append(row_of(bench, result.shapes) if "stats" in bench else bench)
    return result


def row_of(bench: dict, shapes: dict[str, dict]) -> dict:
    """What is kept of one of pytest-benchmark's entries; what belongs to its shape goes into ``shapes``."""
    said, stats = dict(bench["extra_info"]), bench["stats"]
    said.setdefault("kind", "other")
    if said["kind"] == "layer":
        shapes[said["name"]] = {key: said.pop(key) for key in OF_SHAPE}
    times = {key: stats[key] for key in ("min", "p20", "median", "p80")}
    return {**said, "n": stats["rounds"], **{key: float(f"{value:.6g}") for key, value in times.items()}}


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


def ratio(group: Group, peer: str) -> float | None:
    """How many times as long a peer takes as we do."""
    return group[peer]["median"] / group[OURS]["median"] if {peer, OURS} <= set(group) else None


def adapter(group: Group, peer: str) -> float | None:
    """A peer's time less that of the frozen layer, where more than the spread is left of it."""
    if not {peer, "base"} <= set(group):
        return None
    left = group[peer]["median"] - group["base"]["median"]
    return left if left > 0.005 * group["base"]["median"] else None


def adapter_ratio(group: Group) -> float | None:
    """How many times as long eager's adapter takes as ours; infinite where ours comes free with its base layer."""
    ours, eager = adapter(group, OURS), adapter(group, "eager")
    if not eager or OURS not in group:
        return None
    return eager / ours if ours else math.inf


def lost(result: Result, peer: str) -> list[tuple]:
    """The groups in which we are slower than a peer, the worst first."""
    ratios = {key: ratio(group, peer) for key, group in result.groups().items()}
    return sorted((key for key, value in ratios.items() if value and value * SLOWER < 1), key=lambda key: ratios[key])


def aims(result: Result) -> list[tuple[tuple, str, float, float | None]]:
    """Cell, what is compared, the aim and what was reached."""
    found = []
    for key, group in result.groups().items():
        name, _, way, clock = key
        shape = result.shape(name)
        if clock == "graph" and any(shape.aims):
            aim = dict(zip(WAYS, (*shape.aims, 1.0), strict=True))[way]
            found.append((key, "layer against eager", aim, ratio(group, "eager")))
        elif clock == "wall" and not any(shape.aims) and way != "backward":
            found.append((key, "layer against aten", 1 / SLOWER, ratio(group, "aten")))
            if aim := adapter_aim(shape):
                found.append((key, "adapter against eager's", aim, adapter_ratio(group)))
    return [entry for entry in found if entry[3] is not None]


def adapter_aim(shape: Shape) -> float:
    """How much faster than eager's the adapter alone is to be on a CPU (0: no aim)."""
    if shape.tokens < 2048:
        return 1.2
    if shape.rank_one:
        return 4.0
    if shape.dropout:
        return 2.5
    return 1.7 if shape.cached or shape.m <= shape.n else 0.0
