"""A layer in every shape of the table, forward, backward and as a step of both, beside all its peers.

pytest-benchmark times one function after the other, and peers that are compared have to take turns. So the first cell
of a group (shape, dtype, way, clock) measures all of the group's peers, and every cell then plays its own times back.
A step is a forward and its backward; the backward alone repeats on a forward that was made before. The forward of what
trains is the one that keeps what its backward needs; a cached condition runs under no_grad.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import NamedTuple

import measure
import model
import peers
import pytest
import torch
import torch._functorch.config
from measure import DTYPES
from peers import PEERS, ROUTED, Layer
from shapes import SWEEP_M, SWEEP_TOKENS, TABLES, Shape

# A backward that is repeated still needs what its forward left; only torch.compile would overwrite it.
torch._functorch.config.donated_buffer = False

SWEEP_PEERS = ["routed_peft", "eager", "aten", "base"]
ROUNDS = 50  # of a run; what more of them would say, another process says better
PLAYER = measure.Recorded()


class Cell(NamedTuple):
    shape: Shape
    dtype: str
    way: str
    clock: str
    peer: str

    def __str__(self):
        return "-".join([self.shape.name, *self[1:]]).replace(" ", "_")


def ways(shape: Shape) -> tuple[str, ...]:
    return ("forward",) if shape.cached else model.WAYS


def cells(option) -> list[Cell]:
    """In the order in which they run: the cells of a group, and the groups of a layer, follow each other."""

    def wanted(shapes):
        return [shape for shape in shapes if any(word in shape.name for word in option.shapes)]

    found = [
        Cell(shape, dtype, way, clock, peer)
        for shape in wanted(TABLES[option.size].values())
        for dtype in option.dtypes
        for way in ways(shape)
        for clock in option.clocks
        for peer in option.peers
    ]
    sweeps = wanted(SWEEP_TOKENS[option.size] + SWEEP_M[option.size])
    peers_of_sweeps = [peer for peer in option.peers if peer in SWEEP_PEERS]
    found += [
        Cell(shape, option.dtypes[0], "step", option.clocks[0], peer) for shape in sweeps for peer in peers_of_sweeps
    ]
    return found


def pytest_generate_tests(metafunc):
    if "cell" in metafunc.fixturenames:
        metafunc.parametrize("cell", cells(metafunc.config.option), ids=str)


class Timed:
    """A layer with those of the peers that can run it, and the times of one group at a time.

    Attributes:
        problems: why a peer has no times, by its name; ``failed``, why none in the group at hand.
        memory: saved_bytes and peak_bytes of a step by peer.
    """

    def __init__(self, shape: Shape, dtype: str, names: list[str], device: str, seconds: float):
        self.shape, self.dtype, self.device, self.seconds = shape, dtype, device, seconds
        self.problems: dict[str, Exception] = {}
        self.failed: dict[str, Exception] = {}
        self.forwards: dict[str, peers.Forward] = {}
        self.memory: dict[str, dict] = {}
        self.launches: dict[tuple[str, str], int] = {}
        self.group, self.times = None, {}
        for name in names:
            if name in ROUTED:
                self._attempt(self.problems, name, peers.check, name, shape, DTYPES[dtype], device)
        peers._definition.cache_clear()
        self.layer = Layer(shape, DTYPES[dtype], device, calls=1 if device == "cpu" else measure.CALLS)
        for name in names:
            if name not in self.problems:
                forward = self._attempt(self.problems, name, PEERS[name], self.layer)
                if name not in self.problems:
                    self.forwards[name] = forward

    @staticmethod
    def _attempt(problems: dict[str, Exception], name: str, body: Callable, *args):
        """One peer's failure is its own, and leaves the others their times."""
        try:
            return body(*args)
        except Exception as error:
            problems[name] = error.with_traceback(None)  # which would hold on to the tensors

    def times_of(self, cell: Cell) -> list[float]:
        if self.group != (cell.way, cell.clock):
            self.group, self.times = (cell.way, cell.clock), self._measure(cell.way, cell.clock)
        for problems in (self.problems, self.failed):
            if cell.peer in problems:
                raise problems[cell.peer]
        return self.times[cell.peer]

    def _measure(self, way: str, clock: str) -> dict[str, list[float]]:
        samples, self.failed = {}, {}
        for name in self.forwards:
            sample = self._attempt(self.failed, name, self._sample, name, way, clock)
            if name not in self.failed:
                samples[name] = sample
        return measure.interleaved(samples, ROUNDS, self.seconds)

    def _sample(self, name: str, way: str, clock: str) -> measure.Sample:
        if way == "step" and name not in self.memory:
            self._weigh(name)
        if self.device != "cpu" and (name, way) not in self.launches:
            self.launches[name, way] = self._count(name, way)
        if clock != "wall" and not peers.capturable(name, self.shape):
            raise peers.Unavailable(f"{name} waits for the device in a layer of slices, which a graph cannot")
        call = self.call(name, way, captured=clock != "wall")
        if clock == "wall":
            return measure.wall(call, self.device)
        return measure.graph(call, warm=clock == "graph warm")

    def call(self, name: str, way: str, captured: bool = False) -> measure.Call:
        layer, forward, turns = self.layer, self.forwards[name], len(self.layer.x)
        if self.shape.cached:

            def without_gradients(i: int):
                with torch.no_grad():
                    return forward(layer.x[i % turns])

            return without_gradients
        if way == "forward":
            return lambda i: forward(layer.x[i % turns])
        learned = peers.trained(name, layer, forward)

        def gradients(out: torch.Tensor, i: int, again: bool):
            return torch.autograd.grad(out, (layer.x[i], *learned), layer.dout[i], retain_graph=again)

        if way == "step":
            return lambda i: gradients(forward(layer.x[i % turns]), i % turns, again=False)
        if captured:  # a backward runs on the stream of its forward, which is then the one that is captured
            stream = measure.capture_stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                outs = [forward(x) for x in layer.x]
        else:
            outs = [forward(x) for x in layer.x]
        return lambda i: gradients(outs[i % turns], i % turns, again=True)

    def _weigh(self, name: str) -> None:
        layer, forward = self.layer, self.forwards[name]
        fixed = [layer.A, layer.B, layer.W, layer.bias, layer.y, *peers.trained(name, layer, forward)]
        fixed += forward.parameters() if isinstance(forward, torch.nn.Module) else []
        parameters = {t.untyped_storage().data_ptr() for t in fixed}
        step = self.call(name, "step")
        self.memory[name] = {
            "saved_bytes": measure.saved_bytes(lambda: forward(layer.x[0]), parameters),
            "peak_bytes": measure.peak_bytes(lambda: step(0), self.device),
        }

    def _count(self, name: str, way: str) -> int:
        call = self.call(name, way)
        return measure.launches(lambda: call(0))


current: Timed | None = None


def free() -> None:
    global current
    current = None
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@pytest.fixture(scope="module", autouse=True)
def freed():
    yield
    free()


def timed(cell: Cell, option) -> Timed:
    global current
    names = [name for name in option.peers if name in SWEEP_PEERS or not cell.shape.family.startswith("sweep")]
    if current is None or (current.shape, current.dtype) != (cell.shape, cell.dtype):
        free()
        current = Timed(cell.shape, cell.dtype, names, option.device, option.seconds)
    return current


@pytest.mark.benchmark(timer=PLAYER.now)
def test_layer(benchmark, cell, pytestconfig):
    layer, device = timed(cell, pytestconfig.option), pytestconfig.option.device
    try:
        times = layer.times_of(cell)
    except peers.Unavailable as why:
        pytest.skip(str(why))
    shape, itemsize = cell.shape, DTYPES[cell.dtype].itemsize
    moved, operations = model.moved_bytes(shape, cell.way, itemsize), model.flops(shape, cell.way)
    rates = measure.copy_bandwidth(device), measure.product_rate(device, DTYPES[cell.dtype])
    benchmark.group = "-".join([shape.name, cell.dtype, cell.way, cell.clock])
    benchmark.extra_info.update(
        kind="layer", shape=vars(shape), name=shape.name, family=shape.family, text=str(shape), tokens=shape.tokens,
        M=shape.m, R=shape.width, dtype=cell.dtype, way=cell.way, clock=cell.clock, peer=cell.peer, device=device,
        model_bytes=moved, model_flops=operations, floor_seconds=max(moved / rates[0], operations / rates[1]),
        rounds=times,
    )  # fmt: skip
    if cell.way == "step":
        benchmark.extra_info.update(layer.memory[cell.peer])
    if device != "cpu":
        benchmark.extra_info["launches"] = layer.launches[cell.peer, cell.way]
    PLAYER.load(times)
    benchmark.pedantic(PLAYER.play, rounds=len(times), iterations=1)
