"""A result as markdown: its own page, and the section "Speed" of the project's README."""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Sequence

import peers
from outcome import (
    OFF,
    OURS,
    SLOWER,
    Group,
    Result,
    adapter,
    adapter_ratio,
    aims,
    certainty,
    lost,
    perhaps,
    ratio,
    surely,
    times_ours,
)  # fmt: skip

MARKS = ("<!-- benchmarks: begin -->", "<!-- benchmarks: end -->")
# What the README shows, where it was measured, beside the cells that lose most to aten.
SHOWN = [
    ("gpt2-add", "step"), ("gpt2-mul", "step"), ("gpt2-expand", "step"), ("gpt2-gram", "step"),
    ("roberta-gram", "step"), ("llava-gram-dropout", "step"), ("decode-64-mul", "forward"),
]  # fmt: skip
README_PEERS = (OURS, "eager", "compile", "aten", "peft", "base")
LAYERS = """\
Medians; after the comma how many times as long as routed_peft that is, by the median of what it is in each round in
which all peers took their turn (of several runs, which are processes, the median of theirs), **bold** where the peer is
faster. An adapter's time is the layer's less that of base, and – where no more than the spread is left of it; eager's
is ∞ times as long as ours where our layer takes no longer than the base alone in torch. `of copy` is what routed_peft
has to move (benchmarks/model.py) over its time, as a part of the measured copy bandwidth.
"""
INTERVAL = """\
An interval holds the median with a certainty of {certainty:.0%}; it is that of {samples}.
"""
MEMORY = """\
MB that are kept for the backward, without parameters / MB at most beyond what was there before.
"""
PLANNER = """\
Each choice of csrc/kernels/plan.h, timed as planned and forced every way; a cell is off where the call as planned takes
more than {off:.0%} longer than the best way.
"""
README = """\
A layer with its frozen base, on {machine}, by {command}. Medians; after the comma how many times as long as routed_peft
that is, by the median over {samples}, **bold** where the peer is faster. eager is the layer as one writes it in torch,
aten the strongest form in plain torch with a backward by hand; peft is a LoRA without a route, on all columns also
where ours is on slices of them (the gpt2 layers, where it has twice the products), and base no update at all.
"""
REST = """\
routed_peft is slower than aten by more than {slower:.0%} in {lost} of {compared} groups of shape, dtype and way{where};
in {surely} of them by the whole interval that holds the median with a certainty of {certainty:.0%}. In {perhaps} more
the interval reaches to where it is slower.
"""
MORE = """\
All of them, with memory and plots, are in [benchmarks/results/README.md](benchmarks/results/README.md), from
`benchmarks/results/{name}.json`.
"""


def seconds(value: float) -> str:
    for unit, factor in (("s", 1), ("ms", 1e3), ("us", 1e6)):
        if value * factor >= 1:
            return f"{value * factor:.3g} {unit}" if value * factor < 100 else f"{value * factor:.0f} {unit}"
    return f"{value * 1e9:.0f} ns"


def table(header: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}", *(f"| {' | '.join(row)} |" for row in rows), ""]


def times_of(group: Group, peer: str) -> str:
    """A median and its ratio to ours; bold where that is the faster one. The base alone has no update to lose to."""
    if peer not in group:
        return "–"
    said, times = seconds(group[peer]["median"]), ratio(group, peer)
    if peer == OURS or times is None:
        return said
    shown = f"{times.value:.2f}"
    return f"{said}, **{shown}**" if times.value < 0.995 and peer != "base" else f"{said}, {shown}"


def bold(times: float) -> str:
    return f"{times:.2f}" if times >= 0.995 else f"**{times:.2f}**"


def layer_tables(result: Result) -> list[str]:
    lines, groups, copy = [], result.groups(), result.facts["copy bandwidth, GB/s"] * 1e9
    for dtype, way, clock in dict.fromkeys(key[1:] for key in groups):
        mine = {key[0]: group for key, group in groups.items() if key[1:] == (dtype, way, clock)}
        names = [peer for peer in peers.PEERS if any(peer in group for group in mine.values())]
        rows = []
        for name, group in mine.items():
            ours, own, faster = group.get(OURS), adapter(group, OURS), adapter_ratio(group)
            rows.append(
                [name, *(times_of(group, peer) for peer in names), seconds(own) if own else "–"]
                + ["–" if not faster else "∞" if faster == math.inf else bold(faster)]
                + [f"{ours['model_bytes'] / ours['median'] / copy:.0%}" if ours else "–"]
            )
        lines += [f"### {way}, {dtype}, {clock}", ""]
        lines += table(["shape", *names, "our adapter", "eager's / ours", "of copy"], rows)
    return lines


def memory_tables(result: Result) -> list[str]:
    lines = []
    groups = {key: group for key, group in result.groups().items() if key[2] == "step" and key[3] in ("wall", "graph")}
    for dtype, clock in dict.fromkeys((key[1], key[3]) for key in groups):
        mine = {key[0]: group for key, group in groups.items() if (key[1], key[3]) == (dtype, clock)}
        if clock == "wall" and any(key[3] == "graph" for key in groups):
            continue  # a GPU has the same numbers for every clock
        names = [peer for peer in peers.PEERS if any(peer in group for group in mine.values())]

        def cell(row: dict | None) -> str:
            if not row:
                return "–"
            peak = "–" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:.1f}"
            launched = f", {row['launches']} launches" if "launches" in row else ""
            return f"{row['saved_bytes'] / 1e6:.1f} / {peak}{launched}"

        rows = [[name, *(cell(group.get(peer)) for peer in names)] for name, group in mine.items()]
        lines += [f"### {dtype}", "", *table(["shape", *names], rows)]
    return lines


def other_tables(result: Result) -> list[str]:
    """A table for each other kind of benchmark: what it said, and the median."""
    lines, times = [], ("n", "min", "p20", "median", "p80")
    for kind, rows in result.others().items():
        said = dict.fromkeys(key for row in rows for key in row if key not in (*times, "kind"))
        columns = [key for key in said if any(not isinstance(row.get(key), dict | list | None) for row in rows)]
        ratios, body = [times_ours(row, rows) for row in rows], []
        for row, ours in zip(rows, ratios, strict=True):
            body.append([*(plain(row.get(key)) for key in columns), seconds(row["median"])])
            if any(ratios):
                body[-1].append("–" if ours is None else f"{ours:.2f}" if row["peer"] == "base" else bold(ours))
        header = [*columns, "median", "/ ours"] if any(ratios) else [*columns, "median"]
        lines += [f"## {kind.capitalize()}", "", *table(header, body)]
    return lines


def planner_tables(result: Result) -> list[str]:
    """How often the planner chose the best way, and where not."""
    rows = result.of_kind("planner")
    if not rows:
        return []
    lines, body = ["## Planner", "", PLANNER.format(off=OFF - 1)], []
    for choice in dict.fromkeys(row["choice"] for row in rows):
        mine = [row for row in rows if row["choice"] == choice]
        bad = [row["off"] for row in mine if row["off"] > OFF]
        body.append(
            [choice, ", ".join(mine[0]["ways"]), str(len(mine)), str(len(bad)), f"{max(bad):.2f}" if bad else "–"]
        )
    lines += table(["choice", "ways", "cells", "off", "worst"], body)
    bad = sorted((row for row in rows if row["off"] > OFF), key=lambda row: -row["off"])
    if bad:
        body = [
            [row["choice"], f"batch {row['batch']}, {row['call']}", row["dtype"], row["way"]]
            + [", ".join(f"{way}: {seconds(time)}" for way, time in row["ways"].items())]
            + [seconds(row["median"]), f"**{row['off']:.2f}**"]
            for row in bad
        ]
        lines += table(["choice", "call", "dtype", "", "ways", "as planned", "off"], body)
    return lines


def plain(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "**no**"
    return f"{value:,.4g}" if isinstance(value, float) else "" if value is None else str(value).replace("|", "\\|")


def samples(result: Result) -> dict[str, str | float]:
    count, kind = result.samples
    said = f"{count} runs, each a process" if kind == "runs" else "the rounds in which all took turns"
    return {"samples": said, "certainty": certainty(count)}


def summary(result: Result) -> list[str]:
    lines, groups = ["## Summary", ""], result.groups()
    for peer in ("aten", "eager"):
        compared = [key for key, group in groups.items() if ratio(group, peer) is not None]
        losses = lost(result, peer)
        lines.append(
            f"* Slower than {peer} by more than {SLOWER - 1:.0%} in {len(losses)} of {len(compared)} groups, "
            f"in {surely(losses)} of them by the whole interval (in brackets); in {perhaps(result, peer)} more the "
            "interval reaches there."
        )
        lines += [f"  * {', '.join(key)}: {times}" for key, times in losses.items()]
    for kind, rows in result.others().items():
        times = [(row, times_ours(row, rows)) for row in rows if row.get("peer") != "base"]
        slower = [row for row, ratio in times if ratio is not None and ratio * SLOWER < 1]
        compared = sum(ratio is not None for _, ratio in times)
        if compared:
            lines.append(f"* {kind.capitalize()}: slower by more than {SLOWER - 1:.0%} in {len(slower)} of {compared}.")
    wanted = aims(result)
    missed = [aim for aim in wanted if aim.reached < aim.aim]
    doubtless = sum(aim.surely_missed for aim in missed)
    lines += [f"* {len(missed)} of {len(wanted)} aims missed, {doubtless} of them by the whole interval.", ""]
    lines += [paragraph(INTERVAL, **samples(result)), ""]
    if missed:
        body = [
            [*aim.cell, aim.what, f"{aim.aim:.2f}", f"**{aim.reached:.2f}**", "" if aim.surely_missed else "yes"]
            for aim in missed
        ]
        lines += table(["shape", "dtype", "way", "clock", "ratio", "aim", "reached", "in doubt"], body)
    return lines


def page(result: Result, pictures: list[str], others: Sequence[str] = ()) -> str:
    """The page of a result; ``others`` names those of other machines or times that lie beside it."""
    facts = [f"* {key}: {json.dumps(v) if isinstance(v, dict) else v}" for key, v in result.facts.items()]
    lines = [f"# Benchmarks: {result.facts['device']}", ""]
    lines += [f"By benchmarks/report.py from [{result.name}.json]({result.name}.json).", "", *facts, ""]
    if others:
        lines += ["Beside it: " + ", ".join(f"[{name}]({name}.json)" for name in others) + ".", ""]
    if result.notes:
        lines += ["Not measured:", "", *(f"* {note}" for note in result.notes), ""]
    if result.groups():
        lines += [*summary(result), *(f"![{name}]({name})\n" for name in pictures)]
        lines += ["## Layers", "", LAYERS]
        names = dict.fromkeys(key[0] for key in result.groups())
        lines += [f"* {name}: {result.shapes[name]['text']}" for name in names]
        lines += ["", *(f"* {name}: {peers.doc(name)}" for name in peers.PEERS), "", *layer_tables(result)]
        lines += ["## Memory of a step", "", MEMORY, *memory_tables(result)]
    return "\n".join([*lines, *planner_tables(result), *other_tables(result)]).rstrip() + "\n"


def paragraph(text: str, **values) -> str:
    return textwrap.fill(text.format(**values), width=120, break_long_words=False, break_on_hyphens=False)


def readme_block(result: Result) -> str:
    """What the project's README says of a result, its marks included."""
    groups, facts = result.groups(), result.facts
    first = next(iter(groups))
    dtypes = dict.fromkeys(key[1] for key in groups)
    keys = [(name, dtype, way, first[3]) for dtype in dtypes for name, way in SHOWN]
    keys = [key for key in keys if key in groups]
    losses = lost(result, "aten")
    keys += [key for key in losses if key not in keys][:2]
    names = [peer for peer in README_PEERS if any(peer in groups[key] for key in keys)]
    body = []
    for key in keys:
        shape = f"{key[0]}: {result.shapes[key[0]]['text']}"
        body.append([shape, key[1], key[2], *(times_of(groups[key], peer) for peer in names)])
    about = [facts[key] for key in ("processor",) if facts.get(key)]
    about += [f"threads: {facts['threads']}"] if "threads" in facts else []
    machine = [facts["device"], *about, f"torch {facts['torch']}", facts["date"], f"commit {facts['commit']}"]
    compared = sum(ratio(group, "aten") is not None for group in groups.values())
    where = "; the last rows are where it loses most" if losses else ""
    several = "; " in facts["command"]
    command = "the commands that the page below names" if several else f"`{facts['command']}`"
    lines = [MARKS[0], paragraph(README, machine=", ".join(machine), command=command, **samples(result)), ""]
    lines += table(["layer", "dtype", "", *names], body)
    lines += [
        paragraph(
            REST,
            slower=SLOWER - 1,
            lost=len(losses),
            compared=compared,
            where=where,
            surely=surely(losses),
            perhaps=perhaps(result, "aten"),
            **samples(result),
        )
    ]
    return "\n".join([*lines, "", paragraph(MORE, name=result.name), MARKS[1]])


def put_block(readme: str, block: str) -> str:
    before, _, rest = readme.partition(MARKS[0])
    _, found, after = rest.partition(MARKS[1])
    if not found:
        raise SystemExit(f"README.md has no section between {MARKS[0]} and {MARKS[1]}")
    return before + block + after
