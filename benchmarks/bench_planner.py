"""Where the planner (csrc/kernels/plan.h) chooses worse than it could: every choice it makes, both ways, over a grid.

    pytest benchmarks/bench_planner.py --benchmark-only

A cell is one choice at one shape. It times the call as planned and with the choice forced each way, in turns; what
pytest-benchmark shows is the call as planned, and ``off`` is its median over that of the best way. A cell that is more
than 5 % off is measured again, longer, before it counts. ``--shapes`` takes words of a cell's name, as "gram_order".
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator
from typing import NamedTuple

import measure
import pytest
import torch
from measure import DTYPES
from outcome import OFF
from peers import SCALING, Layer
from shapes import Shape

from routed_peft import functional, ops

ROUNDS = 25
PLANNED = -1
PLAYER = measure.Recorded()


class Choice(NamedTuple):
    """What is chosen, by its name in plan.h.

    Attributes:
        ways: what the values mean that it can be forced to.
        base: whether the frozen layer is in the call.
        gpu: whether the CUDA kernels choose it too.
        steps: whether a step of forward and backward is timed beside the forward without gradients.
    """

    ways: dict[int, str]
    base: bool = False
    gpu: bool = False
    steps: bool = True


CHOICES = {
    "rank_one": Choice({0: "R-wide rows", 1: "one number a row"}, gpu=True),
    "gram_order": Choice({0: "through S", 1: "through V"}, gpu=True),
    "library_gemm": Choice({0: "ours", 1: "the library's"}),
    "library_base": Choice({0: "ours, with the update", 1: "the library's"}, base=True),
    "by_lines": Choice({0: "panels", 1: "lines"}, steps=False),
    "split": Choice({0: "whole numbers", 1: "their parts, by tiles"}),
    "reduction_splits": Choice({n: f"{n} parts" for n in (1, 2, 4, 8, 16)}),
}


def shapes_of(choice: str) -> Iterator[Shape]:
    def shape(batch: int, n: int, d: int, r: int, routing: str, m: int = 1) -> Shape:
        name = f"{choice}-{routing}-{batch}x{n}-{d}-r{r}-m{m}"
        return Shape(name, "planner", batch, n, d, d, r, routing, m=m)

    product = itertools.product
    if choice == "rank_one":
        for (batch, n), r, routing in product(
            [(1, 64), (8, 256), (256, 8), (1, 2048)], (8, 64, 128), ("gram", "expand")
        ):
            yield shape(batch, n, 512, r, routing)
    elif choice == "gram_order":
        for (batch, n), m, r in product([(64, 32), (8, 256), (2, 1024), (256, 8)], (8, 64, 197, 576), (16, 64, 128)):
            yield shape(batch, n, 128, r, "gram", m)
    elif choice == "library_gemm":
        far = [(8192, 512, 16), (8192, 512, 64), (2048, 5504, 16), (2048, 5504, 64), (2048, 2048, 192)]
        for n, d, r in (*product((64, 512, 2048), (256, 1024, 2048), (16, 64, 128)), *far):
            yield shape(1, n, d, r, "mul")
    elif choice == "library_base":
        for n, d in product((1, 4, 8, 16, 32, 128, 1024), (768, 2048, 4096)):
            if n * d < 2**22:
                yield shape(1, n, d, 16, "mul")
    elif choice == "split":
        for n, d, r in product((256, 512, 1024, 2048), (256, 768, 2048), (32, 64, 128)):
            yield shape(1, n, d, r, "mul")
    elif choice == "by_lines":
        for n, d, r in product((1, 2, 4, 8, 16), (256, 1024, 4096), (16, 64)):
            yield shape(1, n, d, r, "mul")
    else:
        for (batch, n), r in product([(1, 256), (1, 2048), (2, 1024), (8, 256), (16, 128)], (16, 128)):
            yield shape(batch, n, 256, r, "mul")


class Cell(NamedTuple):
    choice: str
    shape: Shape
    dtype: str
    way: str

    def __str__(self):
        return "-".join([self.shape.name, self.dtype, self.way])


def cells(option) -> list[Cell]:
    return [
        Cell(name, shape, dtype, way)
        for name, choice in CHOICES.items()
        if choice.gpu or option.device == "cpu"
        for shape in shapes_of(name)
        if any(word in shape.name for word in option.shapes)
        for dtype in option.dtypes
        for way in (("forward", "step") if choice.steps else ("forward",))
    ]


def pytest_generate_tests(metafunc):
    if "cell" in metafunc.fixturenames:
        metafunc.parametrize("cell", cells(metafunc.config.option), ids=str)


def call_of(cell: Cell, layer: Layer) -> measure.Call:
    """The call itself, without gradients or as a step."""
    options = dict(routing=cell.shape.routing, scaling=SCALING)
    x, y, A, B = layer.x[0], layer.y, layer.A, layer.B

    def forward() -> torch.Tensor:
        if CHOICES[cell.choice].base:
            return functional.routed_linear(x, layer.W, layer.bias, y, A, B, **options)
        return functional.routed_lora(x, A, y, B, **options)

    def without_gradients(i: int):
        with torch.no_grad():
            return forward()

    if cell.way == "forward":
        return without_gradients
    return lambda i: torch.autograd.grad(forward(), (x, A, B), layer.dout[0])


def forced(choice: str, value: int, call: measure.Call, device: str) -> measure.Sample:
    """A sample with the choice forced to a value; between samples everything is as planned."""

    def under(body):
        ops.extension.force(choice, value)
        try:
            return body()
        finally:
            ops.extension.force(choice, PLANNED)

    sample = under(lambda: measure.wall(call, device))
    return lambda: under(sample)


def medians(times: dict[int, list[float]]) -> dict[int, float]:
    return {value: statistics.median(mine) for value, mine in times.items()}


def measured(cell: Cell, device: str, seconds: float) -> dict[int, list[float]]:
    """The times as planned and of every way."""
    call = call_of(cell, Layer(cell.shape, DTYPES[cell.dtype], device))
    samples = {value: forced(cell.choice, value, call, device) for value in (PLANNED, *CHOICES[cell.choice].ways)}
    times = measure.interleaved(samples, ROUNDS, seconds / 4)
    if medians(times)[PLANNED] > OFF * min(medians(times).values()):
        times = measure.interleaved(samples, 3 * ROUNDS, seconds)
    return times


@pytest.mark.benchmark(timer=PLAYER.now)
def test_planner(benchmark, cell, pytestconfig):
    option = pytestconfig.option
    times = measured(cell, option.device, option.seconds)
    said = medians(times)
    best = min(CHOICES[cell.choice].ways, key=said.__getitem__)
    ways = {name: float(f"{said[value]:.4g}") for value, name in CHOICES[cell.choice].ways.items()}
    benchmark.group = cell.choice
    benchmark.extra_info.update(
        kind="planner", choice=cell.choice, call=str(cell.shape), batch=cell.shape.batch, dtype=cell.dtype,
        way=cell.way, device=option.device, best=CHOICES[cell.choice].ways[best],
        off=round(said[PLANNED] / said[best], 4), ways=ways,
    )  # fmt: skip
    PLAYER.load(times[PLANNED])
    benchmark.pedantic(PLAYER.play, rounds=len(times[PLANNED]), iterations=1)
