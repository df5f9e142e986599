"""The plots of a result: roofline, ratios, time against tokens and against M, memory."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib
import peers
from outcome import ratio

if TYPE_CHECKING:
    from outcome import Result

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.ticker import NullFormatter  # noqa: E402

COLORS = dict(zip(peers.PEERS, plt.get_cmap("tab10").colors, strict=True))
FAMILY_MARKS = {"paper": "o", "llava": "s", "decode": "^"}
CLOCKS = ("wall", "graph")  # of a GPU's three the last of these; of a CPU the first


def draw(result: Result, folder: Path) -> list[str]:
    """Write those plots that there is something for; their names."""
    groups = result.groups()
    clocks = {key[3] for key in groups} | {key[3] for key in result.groups(sweeps=True)}
    clock = next((name for name in reversed(CLOCKS) if name in clocks), None)
    groups = {key: group for key, group in groups.items() if key[3] == clock and "routed_peft" in group}
    pictures = {
        "roofline.png": lambda: roofline(result, groups),
        "ratios.png": lambda: ratios(groups),
        "tokens.png": lambda: sweep(result, "sweep tokens", "tokens"),
        "m.png": lambda: sweep(result, "sweep M", "M"),
        "memory.png": lambda: memory(groups),
    }
    drawn = []
    for name, picture in pictures.items():
        figure = picture()
        if figure:
            figure.savefig(folder / name, dpi=110, bbox_inches="tight", metadata={"Software": None})
            plt.close(figure)
            drawn.append(name)
    return drawn


def roofline(result: Result, groups: dict):
    """Operations a second against operations a byte, below what the machine copies and multiplies."""
    dtypes = list(dict.fromkeys(key[1] for key in groups))
    if not dtypes:
        return None
    figure, axes = plt.subplots(1, len(dtypes), figsize=(6.5 * len(dtypes), 4.8), squeeze=False)
    copy = result.facts["copy bandwidth, GB/s"]
    for axis, dtype in zip(axes[0], dtypes, strict=True):
        mine = {key: group["routed_peft"] for key, group in groups.items() if key[1] == dtype}
        intensity = {key: row["model_flops"] / row["model_bytes"] for key, row in mine.items()}
        peak = result.facts["products, GFLOP/s"][dtype]
        knee = peak / copy
        ends = [min(*intensity.values(), knee) / 3, max(*intensity.values(), knee) * 3]
        roof = [min(copy * x, peak) for x in (ends[0], knee, ends[1])]
        axis.plot([ends[0], knee, ends[1]], roof, color="black", label=f"copy {copy:g} GB/s, product {peak:g} GFLOP/s")
        for way, color in zip(("forward", "backward", "step"), ("tab:blue", "tab:orange", "tab:green"), strict=True):
            for family, mark in FAMILY_MARKS.items():
                keys = [k for k in mine if k[2] == way and result.shapes[k[0]]["family"] == family]
                rates = [mine[k]["model_flops"] / mine[k]["median"] / 1e9 for k in keys]
                if keys:
                    x = [intensity[k] for k in keys]
                    axis.scatter(x, rates, s=28, color=color, marker=mark, alpha=0.8, label=f"{way}, {family}")
        axis.set(xscale="log", yscale="log", title=f"routed_peft, {dtype}", xlabel="operations a byte, by the model")
        slowest = min(row["model_flops"] / row["median"] / 1e9 for row in mine.values())
        axis.set(ylabel="GFLOP/s", ylim=(min(slowest, peak / 10) / 3, peak * 1.5))
        _log_ticks(axis.set_xticks, *axis.get_xlim())
        _log_ticks(axis.set_yticks, *axis.get_ylim())
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.yaxis.set_minor_formatter(NullFormatter())
        axis.legend(fontsize=7)
        axis.grid(alpha=0.3, which="both")
    return figure


def _bars(axis, groups: list[tuple[str, dict]], names: list[str], value, start: float) -> None:
    """For each shape a bar of every peer, from the top; they begin at ``start``, for the axis is logarithmic."""
    height = 0.8 / max(1, len(names))
    for i, name in enumerate(names):
        shift = (i - (len(names) - 1) / 2) * height
        found = [(row + shift, value(group, name)) for row, (_, group) in enumerate(groups) if name in group]
        found = [(place, number) for place, number in found if number]
        if found:
            places, numbers = zip(*found, strict=True)
            axis.barh(places, [number - start for number in numbers], height, start, color=COLORS[name], label=name)
    axis.set_xscale("log")
    axis.set_yticks(range(len(groups)), [name for name, _ in groups])
    axis.set_ylim(len(groups) - 0.4, -0.6)
    axis.grid(axis="x", alpha=0.3)
    _log_ticks(axis.set_xticks, *axis.get_xlim())
    axis.minorticks_off()


def _log_ticks(put, low: float, high: float) -> None:
    """A tick at round numbers, written as such."""
    ticks = [digit * 10**power for power in range(-3, 7) for digit in (1, 1.5, 2, 3, 5, 7)]
    ticks = [tick for tick in ticks if low <= tick <= high]
    if len(ticks) > 7:
        ticks = [tick for tick in ticks if f"{tick:g}".strip("0.") in ("1", "2", "5")]
    put(ticks, [f"{tick:g}" for tick in ticks])


def _bar_figure(panels: list[tuple[str, list[tuple[str, dict]], object, float]], names: list[str], label: str):
    """Two panels a row, with one legend for all of them."""
    lines = (len(panels) + 1) // 2
    rows = max(len(groups) for _, groups, _, _ in panels)
    size = (13, lines * (1.2 + rows * (0.25 + 0.09 * len(names))))
    figure, axes = plt.subplots(lines, 2, figsize=size, squeeze=False)
    handles = {}
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    for axis, (title, groups, value, start) in zip(axes.flat, panels, strict=False):
        _bars(axis, groups, names, value, start)
        axis.set(title=title, xlabel=label)
        handles |= {name: handle for handle, name in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.tight_layout()
    figure.legend(
        handles.values(), handles, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(handles), fontsize=8
    )
    return figure, axes.flat


def ratios(groups: dict):
    """How many times as long as routed_peft every peer takes."""
    others = [name for name in peers.PEERS if name not in ("routed_peft", "base")]
    names = [name for name in others if any(name in group for group in groups.values())]

    def times(group: dict, name: str) -> float:
        return ratio(group, name).value

    panels = []
    for dtype, way in dict.fromkeys((key[1], key[2]) for key in groups if key[2] != "backward"):
        mine = [(key[0], group) for key, group in groups.items() if key[1:3] == (dtype, way)]
        panels.append((f"{way}, {dtype}", mine, times, 1.0))
    if not panels or not names:
        return None
    figure, axes = _bar_figure(panels, names, "time over routed_peft's; to the left of 1 the peer is faster")
    for axis, _ in zip(axes, panels, strict=False):
        axis.axvline(1, color="black", linewidth=1)
    return figure


def memory(groups: dict):
    """What a step keeps for its backward, and its peak, in the first dtype."""
    steps = [(key, group) for key, group in groups.items() if key[2] == "step"]
    if not steps:
        return None
    dtype = steps[0][0][1]
    mine = [(key[0], group) for key, group in steps if key[1] == dtype]
    names = [name for name in peers.PEERS if any(name in group for _, group in mine)]
    panels = []
    for what, title in (("saved_bytes", "kept for the backward"), ("peak_bytes", "peak")):

        def megabytes(group: dict, name: str, what=what) -> float:
            return (group[name][what] or 0) / 1e6

        numbers = [megabytes(group, name) for _, group in mine for name in names if name in group]
        least = min((number for number in numbers if number), default=1.0)
        panels.append((f"step, {dtype}: {title}", mine, megabytes, least / 2))
    return _bar_figure(panels, names, "MB")[0]


def sweep(result: Result, family: str, along: str):
    """Time of a step against one number of the shape, with the middle three fifths of the samples."""
    groups = result.groups(sweeps=True)
    groups = {key: group for key, group in groups.items() if result.shapes[key[0]]["family"] == family}
    if not groups:
        return None
    figure, axis = plt.subplots(figsize=(6.5, 4.5))
    for name in peers.PEERS:
        rows = sorted((result.shapes[key[0]][along], group[name]) for key, group in groups.items() if name in group)
        if rows:
            x, y = [place for place, _ in rows], [row["median"] * 1e3 for _, row in rows]
            axis.plot(x, y, marker="o", markersize=4, color=COLORS[name], label=name)
            low, high = ([row[fifth] * 1e3 for _, row in rows] for fifth in ("p20", "p80"))
            axis.fill_between(x, low, high, color=COLORS[name], alpha=0.15, linewidth=0)
    (_, dtype, way, _), first = next(iter(groups)), result.shapes[next(iter(groups))[0]]
    sizes = first["shape"]
    fixed = f"M={first['M']}" if along == "tokens" else f"{first['tokens']:,} tokens"
    title = f"{way}, {sizes['routing']}, {sizes['d']} to {sizes['out']}, R={first['R']}, {fixed}, {dtype}"
    axis.set(xscale="log", yscale="log", title=title, xlabel=along, ylabel="ms")
    ticks = sorted({result.shapes[key[0]][along] for key in groups})
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    _log_ticks(axis.set_yticks, *axis.get_ylim())
    axis.minorticks_off()
    axis.grid(alpha=0.3)
    axis.legend()
    return figure
