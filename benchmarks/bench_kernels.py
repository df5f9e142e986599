"""The CUDA kernels one by one, dropout and a block's memory against their aims; all of it needs a GPU.

A kernel's time is the profiler's, over replays of a captured graph with nothing of it in the cache, and its bandwidth
is held against a copy on the same device; where ncu is on PATH, what the hardware counted stands beside it.
benchmarks/model.py has the cases, the aims and what was predicted. An aim that is missed is part of the result, not a
failure.

    python benchmarks/bench_kernels.py --once CASE      runs one kernel's case a few times, for ncu
"""

from __future__ import annotations

import argparse
import csv
import shutil
import statistics
import subprocess
import sys

import measure
import model
import peers
import pytest
import torch
from peers import Layer
from shapes import Shape

from routed_peft import functional

REPLAYS = 50
NCU_SECONDS = 120
PLAYER = measure.Recorded()
ncu_failed: list[str] = []  # why, once it has
pytestmark = pytest.mark.benchmark(timer=PLAYER.now)


@pytest.fixture(autouse=True)
def on_gpu(device):
    if device != "cuda":
        pytest.skip("the kernels' own benchmarks need a GPU")
    yield
    torch.cuda.empty_cache()


def options(layer: Layer) -> dict:
    """Of an update whose kernels are timed one by one. Dropout's seed is a tensor on the device, so that a call draws
    no random number of its own."""
    seed = torch.tensor([1], device="cuda")
    return dict(
        layer.options(), dropout_p=layer.shape.dropout, condition_dropout_p=0.0, seed=seed, backend="cuda"
    )  # fmt: skip


def update(shape: Shape, onto: bool = False) -> measure.Call:
    """The update alone, or added to what another layer gave; nothing is kept for a backward."""
    layer = Layer(shape, torch.bfloat16, "cuda")
    given = dict(options(layer), out_features=shape.out)

    def call(i: int):
        with torch.no_grad():
            if onto:
                x, base = layer.x[i], layer.dout[i]
                return functional.apply("bench", x, layer.A, layer.y, layer.B, None, base=base, **given)
            return functional.routed_lora(layer.x[i], layer.A, layer.y, layer.B, **given)

    return call


def whole(shape: Shape) -> dict[str, measure.Call]:
    """The base layer with its update, alone, and as one writes it in torch; nothing is kept for a backward."""
    layer = Layer(shape, torch.bfloat16, "cuda")

    def without_gradients(forward: peers.Forward) -> measure.Call:
        def call(i: int):
            with torch.no_grad():
                return forward(layer.x[i])

        return call

    forwards = {"routed_peft": peers.ours(layer, "cuda"), "base": peers.base(layer), "eager": peers.eager(layer)}
    return {name: without_gradients(forward) for name, forward in forwards.items()}


def graph_times(calls: dict[str, measure.Call]) -> dict[str, list[float]]:
    return measure.interleaved({name: measure.graph(call) for name, call in calls.items()}, REPLAYS, seconds=60)


def kernel_times(call: measure.Call, kernel: str) -> list[float]:
    """Seconds of the kernels of that name in one call."""
    graph = measure.capture(call)
    measure.replay(graph, warm=False)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(REPLAYS):
            measure.replay(graph, warm=False)
    times = [event.time_range.elapsed_us() for event in profile.events() if f"{kernel}_kernel" in event.name]
    if not times:
        raise RuntimeError(f"no {kernel} in this call")
    each = max(1, round(len(times) / REPLAYS))
    return [us * 1e-6 * each for us in times]


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
    run = subprocess.run(command, capture_output=True, text=True, timeout=NCU_SECONDS)
    lines = [line for line in run.stdout.splitlines() if line.startswith('"')]
    found = {
        metrics[row["Metric Name"]]: float(row["Metric Value"].replace(",", ""))
        for row in csv.DictReader(lines)
        if row["Metric Name"] in metrics
    }
    if not found:
        raise RuntimeError(f"ncu read nothing: {(run.stdout + run.stderr).strip()[-300:]}")
    return found


def counted(case: str, kernel: str) -> dict[str, object]:
    if not shutil.which("ncu"):
        return {"ncu": "not on PATH"}
    if ncu_failed:  # and would each time, which takes as long
        return {"ncu": ncu_failed[0]}
    torch.cuda.empty_cache()
    try:
        return ncu(case, kernel)
    except (RuntimeError, subprocess.TimeoutExpired) as error:
        ncu_failed.append(str(error))
        return {"ncu": str(error)}


def record(benchmark, case: str, times: list[float], **said) -> None:
    benchmark.extra_info.update(kind="kernel", case=case, dtype="bfloat16", device="cuda", **said)
    PLAYER.load(times)
    benchmark.pedantic(PLAYER.play, rounds=len(times), iterations=1)


@pytest.mark.parametrize("name", model.kernel_cases())
def test_kernel(benchmark, name):
    case = model.kernel_cases()[name]
    times = kernel_times(update(case.shape, case.onto), case.kernel)
    reached = case.bytes / statistics.median(times) / measure.copy_bandwidth("cuda")
    record(
        benchmark, f"{name}: {case.shape}", times, predicted=f"{case.bytes / model.MODEL_BANDWIDTH * 1e6:.1f} us",
        aim=f"at least {case.share:.0%} of copy bandwidth", reached=f"{reached:.0%}", met=reached >= case.share,
        model_bytes=case.bytes, **counted(name, case.kernel),
    )  # fmt: skip


@pytest.mark.parametrize("shape", model.LAYERS, ids=str)
def test_update_beyond_the_base(benchmark, shape):
    times = graph_times(whole(shape))
    medians = {name: statistics.median(mine) for name, mine in times.items()}
    beyond = (medians["routed_peft"] - medians["base"]) * 1e6
    record(
        benchmark, f"update beyond the base: {shape}", times["routed_peft"],
        predicted=f"{model.LAYER_KERNELS * model.LAUNCH_US:.1f} us beyond", aim=f"at most {model.LAYER_AIM_US:g} us",
        reached=f"{beyond:.1f} us", met=beyond <= model.LAYER_AIM_US, base_seconds=medians["base"],
        eager_seconds=medians["eager"],
    )  # fmt: skip


def test_dropout(benchmark):
    shapes = {"off": model.shape(**model.DROPOUT_SHAPE), "on": model.shape(dropout=0.1, **model.DROPOUT_SHAPE)}
    times = graph_times({name: update(shape) for name, shape in shapes.items()})
    off, on = (statistics.median(times[name]) for name in shapes)
    record(
        benchmark, f"dropout 0.1 over none: {shapes['off']}", times["on"],
        predicted=f"{model.predicted_dropout_us():.1f} us", aim=f"at most {model.DROPOUT_AIM:.2f} times",
        reached=f"{on / off:.2f} times", met=on / off <= model.DROPOUT_AIM, without_seconds=off,
    )  # fmt: skip


def test_memory_of_a_block(benchmark):
    """One forward of each layer; those that share an input get the same tensor."""
    sizes = dict(batch=8, n=1024, r=64, routing="mul", dropout=0.1)
    layers = [Layer(model.shape(d=d, out=out, **sizes), torch.bfloat16, "cuda") for d, out, _ in model.BLOCK]
    inputs, parameters = {}, set()
    for (_, _, shared), layer in zip(model.BLOCK, layers, strict=True):
        layer.x = [inputs.setdefault(shared, layer.x[0])]
        parameters |= {t.untyped_storage().data_ptr() for t in (layer.A, layer.B, layer.W, layer.bias, layer.y)}
    held, times = {}, {}
    for name, peer in (("routed_peft", peers.ours), ("eager", peers.eager)):
        forwards = [peer(layer) for layer in layers]

        def block(forwards=forwards):
            return [forward(layer.x[0]) for forward, layer in zip(forwards, layers, strict=True)]

        held[name] = measure.saved_bytes(block, parameters) / 1e6
        times |= measure.interleaved({name: measure.wall(lambda i, block=block: block(), "cuda")}, 10, seconds=5)
    less = held["eager"] / held["routed_peft"]
    record(
        benchmark, "held by the 7 layers of a block, dropout 0.1", times["routed_peft"],
        predicted=f"{model.predicted_memory()[0]:.1f} MB", aim=f"{model.MEMORY_AIM:g} times less than eager",
        reached=f"{held['routed_peft']:.1f} MB, {less:.2f} times less", met=less >= model.MEMORY_AIM,
        eager_megabytes=held["eager"],
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--once", metavar="CASE", choices=[*model.kernel_cases()], required=True)
    case = model.kernel_cases()[parser.parse_args().once]
    call = update(case.shape, case.onto)
    for _ in range(4):
        call(0)
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
