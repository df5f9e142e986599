"""What a layer has to move and to multiply, and what that predicts for an H200.

Numbers are counted once for each kernel that has to read or write them, as the CUDA path cuts a call into kernels:
activations, the base layer's weight and what goes from one kernel to the next, but not A and B, which are small beside
them. A prediction is the bytes over the 4.3 TB/s of an H200, for the base layer's products 790 TFLOP/s if that takes
longer, and at least LAUNCH_US a kernel.

    python benchmarks/model.py      writes the predictions to benchmarks/results/predicted.md
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from shapes import FULL, Shape

RESULTS = Path(__file__).resolve().parent / "results"
BYTES = 2  # of bfloat16, the dtype of every prediction
MODEL_BANDWIDTH = 4.3e12  # bytes a second
MODEL_FLOPS = 790e12
LAUNCH_US = 2.5
WAYS = ("forward", "backward", "step")


# ---- a layer


def _base(s: Shape) -> tuple[float, float]:
    """Numbers moved and operations of x Wᵀ; of dOut W as well."""
    return s.tokens * (s.d + s.out) + s.d * s.out, 2 * s.tokens * s.d * s.out


def _update(s: Shape, way: str) -> list[float]:
    """Numbers moved by each kernel of the update."""
    t = s.tokens
    if s.cached:  # the state is there: v, or a matrix
        conditions = [s.batch * s.width * (1 if s.pooled else s.width)]
    else:
        conditions = [s.batch * s.m * s.d]
    if s.rank_one:  # pooling, projection, q and p, the sweep; backward: two sweeps, products of batch size, sums
        return [*conditions, 0, 0, t * (s.d + s.out)] if way == "forward" else [t * s.adapted, 0, 2 * t * s.d, 0]
    if way == "forward":  # condition, down_route, up_project
        return [*conditions, t * (s.d + 2 * s.width), t * (s.width + s.out)]
    # grad_output, the condition's gradient, grad_input, reduce
    return [t * (s.adapted + 3 * s.width), 0, t * (2 * s.d + s.adapted + 2 * s.width), 0]


def _update_flops(s: Shape, way: str) -> float:
    """Operations of the update's products."""
    rows = 0 if s.cached else s.batch * (1 if s.pooled else s.m)
    condition = 2 * rows * s.d * s.width
    if s.rank_one:
        sweep = 2 * s.tokens * (s.d + s.adapted)
        directions = 2 * s.batch * (s.width * s.d + s.r * s.adapted)
        return condition + directions + sweep * (1 if way == "forward" else 2)
    route = 0
    if not s.pooled:
        matrix = s.width * (s.m * (not s.cached) + s.n)
        route = 2 * s.batch * s.width * min(matrix, matrix if s.cached else 2 * s.n * s.m)
    update = 2 * s.tokens * (s.d * s.width + s.adapted * s.r)
    return condition + (update + route) * (1 if way == "forward" else 2)


def _both(way: str) -> tuple[str, ...]:
    return ("forward", "backward") if way == "step" else (way,)


def moved_bytes(s: Shape, way: str, itemsize: int) -> float:
    """What a layer with its base has to read and write."""
    return itemsize * sum(_base(s)[0] + sum(_update(s, one)) for one in _both(way))


def flops(s: Shape, way: str) -> float:
    """The operations of a layer's products, its base's included."""
    return sum(_base(s)[1] + _update_flops(s, one) for one in _both(way))


# ---- predictions for an H200

LARGE = dict(batch=8, n=1024, d=4096, out=4096)  # 8,192 tokens
QV = dict(d=768, out=2304, merged=True)  # q and v of a merged projection


def shape(**sizes) -> Shape:
    return Shape(name="", family="kernels", **sizes)


@dataclass(frozen=True)
class KernelCase:
    """A kernel in a call of ``shape``, what it has to move, and which share of the copy bandwidth it is to reach."""

    kernel: str
    shape: Shape
    onto: bool  # whether the call adds to what another layer gave
    bytes: float
    share: float


def kernel_cases() -> dict[str, KernelCase]:
    cases = {}
    for r in (16, 32, 64, 128):
        s = shape(r=r, routing="mul", **LARGE)
        read, written = s.tokens * s.d + r * s.d, s.tokens * r
        share = 0.7 if r == 128 else 0.8
        cases[f"down_route R={r}"] = KernelCase("down_route", s, False, BYTES * (read + written), share)
    s = shape(r=64, routing="mul", **LARGE)
    read, written = s.tokens * s.r + s.r * s.out, s.tokens * s.out
    cases["up_project, written"] = KernelCase("up_project", s, False, BYTES * (read + written), 0.85)
    cases["up_project, onto a base"] = KernelCase("up_project", s, True, BYTES * (read + 2 * written), 0.85)
    return cases


# The layer's time is taken less that of its base: condition, down_route (or directions), and what writes the output.
LAYERS = [
    shape(batch=16, n=50, r=128, routing="add", **QV),
    shape(batch=16, n=50, r=64, routing="mul", **QV),
    shape(batch=16, n=125, r=64, routing="expand", dropout=0.1, **QV),
    shape(batch=16, n=125, r=64, routing="gram", m=197, **QV),
]
LAYER_KERNELS = 3
LAYER_AIM_US = 8.0
DROPOUT_SHAPE = dict(r=64, routing="mul", **LARGE)
DROPOUT_AIM = 1.10

# Whole layers, and what forward and backward are to be faster than eager by, at least; the table's follow them.
_WIDE = dict(batch=512, n=50, r=128, dropout=0.1)  # 25,600 tokens
WHOLE = [
    (shape(batch=16, n=50, r=128, routing="add", **QV), 1.6, 1.4),
    (shape(batch=16, n=50, r=64, routing="mul", dropout=0.1, **QV), 1.6, 1.4),
    (shape(batch=16, n=125, r=64, routing="expand", dropout=0.1, **QV), 1.6, 1.4),
    (shape(batch=40, n=32, r=64, routing="gram", m=197, **QV), 1.6, 1.4),
    (shape(batch=512, n=20, d=768, out=768, r=64, routing="mul", dropout=0.1), 1.6, 1.5),
    (shape(batch=512, n=32, r=64, routing="mul", dropout=0.1, **QV), 1.6, 1.5),
    (shape(routing="mul", **_WIDE, **QV), 1.6, 1.5),
    (shape(routing="expand", **_WIDE, **QV), 2.1, 2.2),
    (shape(routing="gram", **_WIDE, **QV), 2.1, 2.2),
    (shape(r=64, routing="mul", dropout=0.1, **LARGE), 1.22, 1.18),
    (shape(r=16, routing="gram", m=576, dropout=0.1, **LARGE), 1.22, 1.18),
    (shape(batch=8, n=1024, d=4096, out=11008, r=64, routing="mul", dropout=0.1), 1.22, 1.18),
]

# The linears of a LLaMA block of 7 billion parameters: width, output, and which of them share their input.
BLOCK = [(4096, 4096, "qkv")] * 3 + [(4096, 4096, "o")] + [(4096, 11008, "gate, up")] * 2 + [(11008, 4096, "down")]
MEMORY_AIM = 2.3


def moved_us(*numbers: float) -> float:
    """A kernel for each count of numbers that it reads and writes."""
    return sum(max(BYTES * n / MODEL_BANDWIDTH * 1e6, LAUNCH_US) for n in numbers)


def predicted_us(s: Shape, way: str) -> float:
    """Microseconds of a layer and its base."""
    moved, operations = _base(s)
    base = max(operations / MODEL_FLOPS * 1e6, moved_us(moved))
    return sum(base + moved_us(*_update(s, one)) for one in _both(way))


def predicted_dropout_us() -> float:
    """The update alone with dropout, in one sweep over its input."""
    s = shape(**DROPOUT_SHAPE)
    return BYTES * s.tokens * (s.d + s.out + 2 * s.width) / MODEL_BANDWIDTH * 1e6


def predicted_memory() -> tuple[float, float]:
    """Megabytes that BLOCK keeps for the backward, ours and eager's: what PEFT's LoRA keeps, copy and mask."""
    t, r = LARGE["batch"] * LARGE["n"], 64
    inputs = {shared: d for d, _, shared in BLOCK}
    ours = sum(BYTES * t * d for d in inputs.values()) + len(BLOCK) * BYTES * t * r
    eager = sum((BYTES + 1) * t * d + 2 * BYTES * t * r for d, _, _ in BLOCK)
    return ours / 1e6, eager / 1e6


def predictions() -> list[tuple[str, str, str]]:
    """Case, prediction and aim."""
    rows = []
    for name, case in kernel_cases().items():
        us = case.bytes / MODEL_BANDWIDTH * 1e6
        rows.append((f"{name}: {case.shape}", f"{us:.1f} us", f"at least {case.share:.0%} of copy bandwidth"))
    for s in LAYERS:
        floor = LAYER_KERNELS * LAUNCH_US
        rows.append((f"update beyond the base: {s}", f"{floor:.1f} us", f"at most {LAYER_AIM_US:g} us"))
    dropout = f"dropout 0.1 over none: {shape(**DROPOUT_SHAPE)}"
    rows.append((dropout, f"{predicted_dropout_us():.1f} us", f"at most {DROPOUT_AIM:.2f} times"))
    listed = {str(s) for s, _, _ in WHOLE}
    for s, *aims in [*WHOLE, *((s, *s.aims) for s in FULL.values() if str(s) not in listed)]:
        for way, aim in zip(WAYS, (*aims, 1.0), strict=True):
            if s.cached and way != "forward":
                continue
            words = f"{aim:g} times faster than eager" if aim > 1 else "faster than eager"
            case = "forward and backward" if way == "step" else way
            rows.append((f"layer, {case}: {s}", f"{predicted_us(s, way):.1f} us", words))
    ours, _ = predicted_memory()
    rows.append(
        ("held by the 7 layers of a block, dropout 0.1", f"{ours:.1f} MB", f"{MEMORY_AIM:g} times less than eager")
    )
    return rows


def main() -> None:
    lines = ["# Predictions for an H200", ""]
    lines += [f"By `python benchmarks/model.py`: {MODEL_BANDWIDTH / 1e12:g} TB/s, {LAUNCH_US:g} us a kernel.", ""]
    lines += ["| case | predicted | aim |", "|---|---|---|"]
    lines += [f"| {' | '.join(row)} |" for row in predictions()]
    (RESULTS / "predicted.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
