"""A layer on a GPU against its aims, forward, backward and both: predicted beside measured, and what fell short.

Times are the GPU's. A layer's is the median over replays of a captured graph of CALLS calls, whose inputs rotate so
that the cache holds none of the large ones; a kernel's is the profiler's median over the same replays. All tensors are
random. Bandwidth is held against a copy on the same device, counting bytes read and written. Predictions are the bytes
that must move over the 4.3 TB/s of an H200, for the base layer's products 790 TFLOP/s if that takes longer, and at
least LAUNCH_US a kernel.

A layer is its frozen base and the update, with gradients of x and of the update's parameters; the condition is frozen
and its projection shared, as in the paper. Eager is the same in plain torch, captured in a graph as well. Of the
backward alone, the forwards ran before the graph was captured. Memory is what autograd holds for the backward, each
storage once and without the parameters; eager's is what PEFT's LoRA keeps, the dropped copy and the mask.

    python benchmarks/bench_layer.py               measures, writes benchmarks/results/<gpu>-<date>-<commit>.{json,md}
    python benchmarks/bench_layer.py --predicted   prints the table without measuring
"""

import argparse
import csv
import datetime
import functools
import json
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import routed_peft
from routed_peft import functional

ROOT = Path(__file__).resolve().parent.parent
CALLS = 8  # in a captured graph, each with its own input
REPLAYS = 50
BYTES = 2  # of bfloat16, the dtype of everything here
MODEL_BANDWIDTH = 4.3e12  # bytes a second
MODEL_FLOPS = 790e12
LAUNCH_US = 2.5
SCALING = 0.5


@dataclass
class Shape:
    """A layer, its input and its condition."""

    batch: int
    n: int
    d: int
    out: int
    r: int
    routing: str
    m: int = 1
    slices: list[tuple[int, int]] | None = None
    dropout: float = 0.0

    @property
    def tokens(self) -> int:
        return self.batch * self.n

    @property
    def width(self) -> int:
        return self.r * len(self.slices or [0])

    @property
    def adapted(self) -> int:
        """Columns of the output that the update reaches."""
        return sum(stop - start for start, stop in self.slices) if self.slices else self.out

    @property
    def rank_one(self) -> bool:
        return self.routing == "expand" or (self.routing == "gram" and self.m == 1)

    def __str__(self):
        parts = [f"{self.routing}, {self.tokens} tokens, {self.d} to {self.out}, R={self.width}"]
        parts += [f"M={self.m}"] if self.m > 1 else []
        parts += [f"dropout {self.dropout}"] if self.dropout else []
        return ", ".join(parts)


class Layer:
    """Random tensors of a shape on the GPU, and the ways to run it."""

    def __init__(self, shape: Shape, calls: int = CALLS):
        s = self.shape = shape
        g = torch.Generator("cuda").manual_seed(0)

        def random(*sizes, scale=1.0):
            return torch.randn(*sizes, generator=g, device="cuda", dtype=torch.bfloat16) * scale

        self.x = [random(s.batch, s.n, s.d) for _ in range(calls)]
        self.base = [random(s.batch, s.n, s.out) for _ in range(calls)]
        self.y = random(s.batch, s.m, s.d)
        self.A, self.B = random(s.width, s.d, scale=s.d**-0.5), random(s.adapted, s.r, scale=s.r**-0.5)
        self.W, self.bias = random(s.out, s.d, scale=s.d**-0.5), random(s.out)
        self.options = dict(
            routing=s.routing, scaling=SCALING, dropout_p=s.dropout, condition_dropout_p=0.0, out_slices=s.slices,
            route_across_slices=s.slices is not None, backend="cuda", seed=torch.tensor([1], device="cuda"),
        )  # fmt: skip

    def update(self, i: int) -> Tensor:
        """The update alone."""
        return functional.routed_lora(self.x[i], self.A, self.y, self.B, out_features=self.shape.out, **self.options)

    def update_onto(self, i: int) -> Tensor:
        """Added to what another layer gave."""
        return functional.apply(
            "bench", self.x[i], self.A, self.y, self.B, None, out_features=self.shape.out, base=self.base[i],
            **self.options,
        )  # fmt: skip

    def routed(self, i: int) -> Tensor:
        """The base layer with its update."""
        return functional.routed_linear(self.x[i], self.W, self.bias, self.y, self.A, self.B, **self.options)

    def plain(self, i: int) -> Tensor:
        """The base layer alone."""
        return F.linear(self.x[i], self.W, self.bias)

    def eager(self, i: int) -> Tensor:
        """The base layer with its update as one writes it in torch."""
        s, x = self.shape, self.x[i]
        h, v = F.linear(F.dropout(x, s.dropout) if s.dropout else x, self.A), F.linear(self.y, self.A)
        if s.routing == "gram":
            z = h @ v.mT @ v / s.m
        elif s.routing == "expand":
            z = h @ v.expand(-1, s.width, -1)
        else:
            z = h + v if s.routing == "add" else h * v
        out, row = self.plain(i), 0
        for k, (start, stop) in enumerate(s.slices or [(0, s.out)]):
            rows = self.B[row : row + stop - start]
            out[..., start:stop] += F.linear(z[..., k * s.r : (k + 1) * s.r], rows) * SCALING
            row += stop - start
        return out

    def leaves(self) -> list[Tensor]:
        """What gets a gradient."""
        return [*self.x, self.A, self.B]

    def backward(self, forward: Callable[[int], Tensor]) -> Callable[[int], object]:
        """The backward of ``forward(i)``, which runs here and now, on the stream that will be captured."""
        for leaf in self.leaves():
            leaf.requires_grad_()
        with torch.cuda.stream(capture_stream()):
            outs = [forward(i) for i in range(CALLS)]
        return lambda i: torch.autograd.grad(
            outs[i], (self.x[i], self.A, self.B), self.base[(i + 1) % CALLS], retain_graph=True
        )

    def step(self, forward: Callable[[int], Tensor]) -> Callable[[int], object]:
        """Forward and backward."""
        for leaf in self.leaves():
            leaf.requires_grad_()
        return lambda i: torch.autograd.grad(forward(i), (self.x[i], self.A, self.B), self.base[(i + 1) % CALLS])


@dataclass
class Row:
    """One line of the result."""

    case: str
    aim: str
    predicted: float
    measured: float | None = None
    unit: str = "us"
    reached: str = ""  # what was reached, in the aim's terms
    met: bool | None = None
    notes: dict = field(default_factory=dict)


@functools.cache
def capture_stream() -> torch.cuda.Stream:
    """One for all graphs: a backward runs on the stream of its forward."""
    return torch.cuda.Stream()


def capture(call: Callable[[int], object]) -> torch.cuda.CUDAGraph:
    """CALLS calls as a graph, after a warm-up outside of it."""
    stream = capture_stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for i in range(CALLS):
            call(i)
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for i in range(CALLS):
                call(i)
    torch.cuda.synchronize()
    return graph


def graph_us(*calls: Callable[[int], object]) -> list[float]:
    """Microseconds of one call of each; their replays take turns, so that a change of clocks meets all of them."""
    graphs = [capture(call) for call in calls]
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(REPLAYS):
        for graph, mine in zip(graphs, times, strict=True):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            mine.append(begin.elapsed_time(end) * 1e3 / CALLS)
    return [statistics.median(mine[REPLAYS // 5 :]) for mine in times]


def kernel_us(call: Callable[[int], object], kernel: str) -> float:
    """Microseconds of the kernels of that name in one call."""
    graph = capture(call)
    graph.replay()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(REPLAYS // 5):
            graph.replay()
        torch.cuda.synchronize()
    times = [event.time_range.elapsed_us() for event in profile.events() if f"{kernel}_kernel" in event.name]
    if not times:
        raise RuntimeError(f"no {kernel} in this call")
    return statistics.median(times) * max(1, round(len(times) / (REPLAYS // 5 * CALLS)))


def copy_bandwidth() -> float:
    """Bytes a second of a large copy on the device, read and written."""
    source = torch.randn(2**28, device="cuda")
    target = torch.empty_like(source)
    times = []
    for _ in range(20):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return 2 * source.nbytes / statistics.median(times[5:])


def ncu(case: str, kernel: str) -> dict[str, float]:
    """What the hardware counted in one launch of a kernel: share of the peak of its memory, and the bytes."""
    metrics = {
        "dram__throughput.avg.pct_of_peak_sustained_elapsed": "ncu_dram_percent",
        "dram__bytes_read.sum": "ncu_bytes_read",
        "dram__bytes_write.sum": "ncu_bytes_written",
        "gpu__time_duration.sum": "ncu_ns",
    }
    command = ["ncu", "--csv", "--print-units", "base", "--clock-control", "none", "--metrics", ",".join(metrics)]
    command += ["--kernel-name", f"{kernel}_kernel", "--launch-skip", "2", "--launch-count", "1"]
    command += [sys.executable, __file__, "--once", case]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    lines = [line for line in run.stdout.splitlines() if line.startswith('"')]
    found = {
        metrics[row["Metric Name"]]: float(row["Metric Value"].replace(",", ""))
        for row in csv.DictReader(lines)
        if row["Metric Name"] in metrics
    }
    if not found:
        raise RuntimeError(f"ncu read nothing: {(run.stdout + run.stderr).strip()[-300:]}")
    return found


# ---- the cases

LARGE = dict(batch=8, n=1024, d=4096, out=4096)  # 8,192 tokens
MERGED = dict(d=768, out=2304, slices=[(0, 768), (1536, 2304)])  # q and v of a merged projection


def kernel_cases() -> dict[str, tuple[str, Shape, str, float, float]]:
    """Kernel, shape, how it is run, the bytes it has to move, and the share of the copy bandwidth it is to reach."""
    cases = {}
    for r in (16, 32, 64, 128):
        shape = Shape(r=r, routing="mul", **LARGE)
        read, written = shape.tokens * shape.d + r * shape.d, shape.tokens * r
        cases[f"down_route R={r}"] = "down_route", shape, "update", BYTES * (read + written), 0.7 if r == 128 else 0.8
    shape = Shape(r=64, routing="mul", **LARGE)
    read, written = shape.tokens * shape.r + shape.r * shape.out, shape.tokens * shape.out
    cases["up_project, written"] = "up_project", shape, "update", BYTES * (read + written), 0.85
    cases["up_project, onto a base"] = "up_project", shape, "update_onto", BYTES * (read + 2 * written), 0.85
    return cases


# The layer's time is taken less that of its base: condition, down_route (or directions), and what writes the output.
LAYERS = [
    Shape(16, 50, r=128, routing="add", **MERGED),
    Shape(16, 50, r=64, routing="mul", **MERGED),
    Shape(16, 125, r=64, routing="expand", dropout=0.1, **MERGED),
    Shape(16, 125, r=64, routing="gram", m=197, **MERGED),
]
LAYER_KERNELS = 3
LAYER_AIM_US = 8.0
DROPOUT_AIM = 1.10

# Whole layers, and what forward and backward are to be faster than eager by, at least.
WIDE = dict(batch=512, n=50, r=128, dropout=0.1)  # 25,600 tokens
WHOLE = [
    (Shape(16, 50, r=128, routing="add", **MERGED), 1.6, 1.4),
    (Shape(16, 50, r=64, routing="mul", dropout=0.1, **MERGED), 1.6, 1.4),
    (Shape(16, 125, r=64, routing="expand", dropout=0.1, **MERGED), 1.6, 1.4),
    (Shape(40, 32, r=64, routing="gram", m=197, **MERGED), 1.6, 1.4),
    (Shape(512, 20, d=768, out=768, r=64, routing="mul", dropout=0.1), 1.6, 1.5),
    (Shape(512, 32, r=64, routing="mul", dropout=0.1, **MERGED), 1.6, 1.5),
    (Shape(routing="mul", **WIDE, **MERGED), 1.6, 1.5),
    (Shape(routing="expand", **WIDE, **MERGED), 2.1, 2.2),
    (Shape(routing="gram", **WIDE, **MERGED), 2.1, 2.2),
    (Shape(r=64, routing="mul", dropout=0.1, **LARGE), 1.22, 1.18),
    (Shape(r=16, routing="gram", m=576, dropout=0.1, **LARGE), 1.22, 1.18),
    (Shape(8, 1024, 4096, 11008, r=64, routing="mul", dropout=0.1), 1.22, 1.18),
]
# The linears of a LLaMA block of 7 billion parameters: width, output, and which of them share their input.
BLOCK = [(4096, 4096, "qkv")] * 3 + [(4096, 4096, "o")] + [(4096, 11008, "gate, up")] * 2 + [(11008, 4096, "down")]
MEMORY_AIM = 2.3


def moved_us(*numbers: float) -> float:
    """A kernel for each count of numbers that it reads and writes."""
    return sum(max(BYTES * n / MODEL_BANDWIDTH * 1e6, LAUNCH_US) for n in numbers)


def predicted_layer(s: Shape) -> tuple[float, float]:
    """Microseconds of the forward and of the backward."""
    t, conditions = s.tokens, s.batch * s.m * s.d
    base = max(2 * t * s.d * s.out / MODEL_FLOPS * 1e6, moved_us(t * s.d + t * s.out + s.d * s.out))  # x Wᵀ, and dOut W
    if s.rank_one:  # pooling, projection, q and p, the sweep; backward: two sweeps, products of batch size, sums
        return base + moved_us(conditions, 0, 0, t * (s.d + s.out)), base + moved_us(t * s.adapted, 0, 2 * t * s.d, 0)
    # condition, down_route, up_project; backward: grad_output, the condition's gradient, grad_input, reduce
    forward = moved_us(conditions, t * (s.d + 2 * s.width), t * (s.width + s.out))
    backward = moved_us(t * (s.adapted + 3 * s.width), 0, t * (2 * s.d + s.adapted + 2 * s.width), 0)
    return base + forward, base + backward


def predicted_memory() -> tuple[float, float]:
    """Megabytes of BLOCK, ours and eager's."""
    t, r = LARGE["batch"] * LARGE["n"], 64
    inputs = {shared: d for d, _, shared in BLOCK}
    ours = sum(BYTES * t * d for d in inputs.values()) + len(BLOCK) * BYTES * t * r
    eager = sum((BYTES + 1) * t * d + 2 * BYTES * t * r for d, _, _ in BLOCK)
    return ours / 1e6, eager / 1e6


def predictions() -> list[Row]:
    rows = []
    for case, (_, shape, _, moved, share) in kernel_cases().items():
        rows.append(Row(f"{case}: {shape}", f"at least {share:.0%} of copy bandwidth", moved / MODEL_BANDWIDTH * 1e6))
    for shape in LAYERS:
        floor = LAYER_KERNELS * LAUNCH_US
        rows.append(Row(f"update beyond the base: {shape}", f"at most {LAYER_AIM_US:g} us", floor))
    adapter = Shape(r=64, routing="mul", **LARGE)
    once = BYTES * adapter.tokens * (adapter.d + adapter.out + 2 * adapter.width) / MODEL_BANDWIDTH * 1e6
    rows.append(Row(f"dropout 0.1 over none: {adapter}", f"at most {DROPOUT_AIM:.2f} times", once))
    for shape, faster_forward, faster_backward in WHOLE:
        forward, backward = predicted_layer(shape)
        rows.append(Row(f"layer, forward: {shape}", f"{faster_forward:g} times faster than eager", forward))
        rows.append(Row(f"layer, backward: {shape}", f"{faster_backward:g} times faster than eager", backward))
        rows.append(Row(f"layer, forward and backward: {shape}", "faster than eager", forward + backward))
    ours, _ = predicted_memory()
    rows.append(
        Row("held by the 7 layers of a block, dropout 0.1", f"{MEMORY_AIM:g} times less than eager", ours, unit="MB")
    )
    return rows


def measure(rows: list[Row], bandwidth: float) -> None:
    """Fill in the rows; one that fails says so and leaves the others alone."""
    pending = iter(rows)
    for case, (kernel, shape, how, moved, share) in kernel_cases().items():
        with_failures(next(pending), measure_kernel, case, kernel, shape, how, moved, share, bandwidth)
    for shape in LAYERS:
        with_failures(next(pending), measure_layer, shape)
    with_failures(next(pending), measure_dropout)
    for shape, *aims in WHOLE:
        for way, aim in zip(("forward", "backward", "step"), (*aims, 1.0), strict=True):
            with_failures(next(pending), measure_whole, shape, way, aim)
    with_failures(next(pending), measure_memory)


def with_failures(row: Row, body: Callable[..., None], *args) -> None:
    try:
        body(row, *args)
    except Exception as error:
        row.met, row.reached = False, f"{type(error).__name__}: {str(error).splitlines()[0]}"
    torch.cuda.empty_cache()
    print(f"{row.case}: {row.reached}", flush=True)


def measure_kernel(row, case, kernel, shape, how, moved, share, bandwidth) -> None:
    row.measured = kernel_us(getattr(Layer(shape), how), kernel)
    reached = moved / (row.measured * 1e-6) / bandwidth
    row.met, row.reached = reached >= share, f"{reached:.0%}"
    row.notes["bytes"] = moved
    if shutil.which("ncu"):
        torch.cuda.empty_cache()
        try:
            row.notes |= ncu(case, kernel)
        except (RuntimeError, subprocess.TimeoutExpired) as error:
            row.notes["ncu"] = str(error)
    else:
        row.notes["ncu"] = "not on PATH"


def measure_layer(row, shape) -> None:
    layer = Layer(shape)
    ours, base, eager = graph_us(layer.routed, layer.plain, layer.eager)
    row.measured = ours - base
    row.met, row.reached = row.measured <= LAYER_AIM_US, f"{row.measured:.1f} us"
    row.notes |= {"layer_us": ours, "base_us": base, "eager_us": eager}


def measure_dropout(row) -> None:
    shape = dict(r=64, routing="mul", **LARGE)
    off, on = graph_us(Layer(Shape(**shape)).update, Layer(Shape(dropout=0.1, **shape)).update)
    row.measured = on
    row.met, row.reached = on / off <= DROPOUT_AIM, f"{on / off:.2f} times"
    row.notes["without_us"] = off


def measure_whole(row, shape, way, aim) -> None:
    """Both sides' layers are alive at once, so that their replays can take turns."""
    layers = [Layer(shape), Layer(shape)]
    forwards = [layers[0].routed, layers[1].eager]
    if way == "forward":
        calls = forwards
    else:
        calls = [getattr(layer, way)(forward) for layer, forward in zip(layers, forwards, strict=True)]
    row.measured, eager = graph_us(*calls)
    row.met, row.reached = eager / row.measured >= aim, f"{eager / row.measured:.2f} times"
    row.notes["eager_us"] = eager


def held_megabytes(forwards: list[Callable[[], Tensor]], parameters: set[int]) -> float:
    """What autograd saves of these calls, each storage once."""
    held: dict[int, int] = {}

    def note(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in parameters:
            held[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        outs = [forward() for forward in forwards]
    del outs
    return sum(held.values()) / 1e6


def measure_memory(row) -> None:
    """One call of each layer of BLOCK; those that share an input get the same tensor."""
    layers = [Layer(Shape(8, 1024, d, out, r=64, routing="mul", dropout=0.1), calls=1) for d, out, _ in BLOCK]
    inputs = {shared: layer.x[0].requires_grad_() for (_, _, shared), layer in zip(BLOCK, layers, strict=True)}
    parameters = set()
    for (_, _, shared), layer in zip(BLOCK, layers, strict=True):
        layer.x = [inputs[shared]]
        parameters |= {t.untyped_storage().data_ptr() for t in (layer.A, layer.B, layer.W, layer.bias, layer.y)}
        layer.A.requires_grad_()
        layer.B.requires_grad_()
    held = [
        held_megabytes([functools.partial(getattr(layer, how), 0) for layer in layers], parameters)
        for how in ("routed", "eager")
    ]
    row.measured = held[0]
    row.met, row.reached = held[1] / held[0] >= MEMORY_AIM, f"{held[1] / held[0]:.2f} times less"
    row.notes["eager_mb"] = held[1]


# ---- the report


def gpu_facts() -> dict[str, str]:
    """What nvidia-smi says now; it is only asked, nothing is set."""
    fields = ["driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.draw", "temperature.gpu"]
    query = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader", "--id=0"]
    try:
        said = subprocess.run(query, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        return {"nvidia-smi": str(error)}
    return dict(zip(fields, (value.strip() for value in said.split(",")), strict=True))


def commit() -> str:
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def markdown(facts: dict, rows: list[Row]) -> str:
    title = [facts[name] for name in ("gpu", "date", "commit") if name in facts]
    lines = [f"# {', '.join(title) or 'Predictions, with nothing measured'}", ""]
    lines += [f"* {name}: {value}" for name, value in facts.items() if name not in ("gpu", "date", "commit")]
    lines += ["", "| case | predicted | measured | aim | reached | |", "|---|---|---|---|---|---|"]
    for row in rows:
        measured = "" if row.measured is None else f"{row.measured:.1f} {row.unit}"
        met = {None: "", True: "met", False: "**short**"}[row.met]
        lines.append(
            f"| {row.case} | {row.predicted:.1f} {row.unit} | {measured} | {row.aim} | {row.reached} | {met} |"
        )
    short = [row for row in rows if row.met is False]
    if any(row.met is not None for row in rows):
        lines += ["", "## What fell short", ""]
        lines += [f"* {row.case}: {row.reached}, aim {row.aim}" for row in short] or ["Nothing."]
    notes = [row for row in rows if row.notes]
    if notes:
        lines += ["", "## Beside it", ""]
        for row in notes:
            said = (f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.notes.items())
            lines.append(f"* {row.case}: {', '.join(said)}")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/results", help="folder for the report")
    parser.add_argument("--predicted", action="store_true", help="print the table without measuring")
    parser.add_argument("--once", metavar="CASE", help="run one kernel's case a few times, for ncu")
    args = parser.parse_args()
    rows = predictions()
    if args.predicted:
        print(markdown({"model": f"{MODEL_BANDWIDTH / 1e12:g} TB/s, {LAUNCH_US:g} us a kernel"}, rows), end="")
        return
    if not torch.cuda.is_available():
        raise SystemExit("no CUDA device")
    if not routed_peft.build_info().get("cuda"):
        raise SystemExit(f"routed_peft has no CUDA kernels: {routed_peft.build_info()}")
    if args.once:
        _, shape, how, _, _ = kernel_cases()[args.once]
        layer = Layer(shape)
        with torch.no_grad():
            for i in range(4):
                getattr(layer, how)(i)
        torch.cuda.synchronize()
        return

    facts = {"gpu": torch.cuda.get_device_name(), "date": datetime.date.today().isoformat(), "commit": commit()}
    facts |= {"torch": torch.__version__, "CUDA": torch.version.cuda, "before": gpu_facts()}
    bandwidth = copy_bandwidth()
    facts["copy bandwidth"] = f"{bandwidth / 1e12:.2f} TB/s"
    measure(rows, bandwidth)
    facts["after"] = gpu_facts()
    report = markdown(facts, rows)
    name = f"{facts['gpu'].lower().replace(' ', '-')}-{facts['date']}-{facts['commit']}"
    args.results.mkdir(parents=True, exist_ok=True)
    (args.results / f"{name}.md").write_text(report)
    found = {**facts, "bytes_per_second": bandwidth, "rows": [vars(row) for row in rows]}
    (args.results / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")
    print(f"\n{report}\nwritten to {args.results / name}.md and .json")
    broken = [row for row in rows if row.measured is None]
    sys.exit(f"{len(broken)} cases did not run" if broken else 0)


if __name__ == "__main__":
    main()
