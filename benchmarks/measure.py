"""How the benchmarks measure: clocks, memory, launches, and what the machine is.

Calls that are compared take turns, round after round, so that a change of the machine's speed meets all of them alike;
what counts are medians and quantiles, and ratios within one run. On a GPU there are three clocks: ``graph`` and ``graph
warm``, the GPU's own time by events around a replay of the call as a captured CUDA graph, with nothing of it in the
cache or right after another replay; and ``wall``, what a user waits who captures nothing, with inputs that take turns.
A CPU has ``wall`` alone.
"""

from __future__ import annotations

import concurrent.futures
import ctypes
import datetime
import functools
import gc
import os
import platform
import random
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch

import routed_peft

ROOT = Path(__file__).resolve().parent.parent
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CLOCKS = {"cpu": ["wall"], "cuda": ["graph", "graph warm", "wall"]}
CHUNK_FRAMES = 136  # frames of _deeper that fill a chunk of CPython's stack
DEPTH_STEP = 37  # frames between the starts of two rounds; it has no divisor in common with the above
CALLS = 8  # inputs that take turns on a GPU
REPLAYS = 4  # of a graph, for one sample
FLUSH_BYTES = 2**28  # more than any GPU's cache
SPIN = 200_000  # cycles in which the GPU waits for the host to have queued what is timed
SHORT = 50e-3  # seconds of a call in whose time it may show what was called before it
LEAST_ROUNDS = 7  # fewer leave a median to chance where the machine is shared
_TURNS = random.Random(0)
Call = Callable[[int], object]  # with the number of the input to take
Sample = Callable[[], float]  # seconds of one call, measured now


# ---- time


def interleaved(samples: dict[str, Sample], rounds: int, seconds: float) -> dict[str, list[float]]:
    """``rounds`` samples of each in turn, or as many as ``seconds`` allow, at least LEAST_ROUNDS.

    The first round warms up and does not count. Each goes in an order of its own, for a call finds in caches and heap
    what the one before it left there, and starts at another depth of Python's stack: CPython keeps frames in chunks of
    16 KiB, and a call that crosses into the next one maps memory and gives it back, every time; whose calls the border
    meets is chance.
    """
    order = list(samples)
    times: dict[str, list[float]] = {name: [] for name in samples}
    for sample in samples.values():
        sample()
    begin = time.perf_counter()
    for done in range(rounds):
        if done >= LEAST_ROUNDS and time.perf_counter() - begin > seconds:
            break
        _TURNS.shuffle(order)
        for name in order:
            times[name].append(_deeper(DEPTH_STEP * done % CHUNK_FRAMES, samples[name]))
    return times


def _deeper(frames: int, sample: Sample) -> float:
    return sample() if frames == 0 else _deeper(frames - 1, sample)


def wall(call: Call, device: str, least: float = 2e-3) -> Sample:
    """What one call takes a user, of as many at a time as take ``least`` seconds together.

    A short call is made once before the clock starts: a program that runs it in a loop finds its own code and data in
    the caches, here the call before it was another's, which may have left some of them there and may not.
    """
    wait = torch.cuda.synchronize if device != "cpu" else lambda: None

    def timed(repeats: int) -> float:
        wait()
        begin = time.perf_counter()
        for i in range(repeats):
            call(i)
        wait()
        return (time.perf_counter() - begin) / repeats

    timed(1)
    once = timed(1)
    if once < SHORT:
        once = min(once, timed(1), timed(1))
    repeats = max(1, min(1000, round(least / once)))

    def sample() -> float:
        if once < SHORT:
            call(0)
        return timed(repeats)

    return sample


@functools.cache
def capture_stream() -> torch.cuda.Stream:
    """One for all graphs: a backward runs on the stream of its forward, and so has to be captured on that one."""
    return torch.cuda.Stream()


def capture(call: Call) -> torch.cuda.CUDAGraph:
    """A call as a graph, after two outside of it. What the call holds has to live as long: the graph does not."""
    stream = capture_stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call(0)
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            call(0)
    torch.cuda.synchronize()
    return graph


@functools.cache
def _flushed() -> torch.Tensor:
    return torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")


def replay(captured: torch.cuda.CUDAGraph, warm: bool) -> float:
    """Seconds of a replay. Before it the GPU is busy, with another replay or with memory that takes the cache, so that
    the host has queued all of it when the clock starts."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    captured.replay() if warm else _flushed().zero_()
    torch.cuda._sleep(SPIN)
    begin.record()
    captured.replay()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1e-3


def graph(call: Call, warm: bool = False) -> Sample:
    """The GPU's time for one call, in replays of a graph."""
    captured = capture(call)

    def sample(held: Call = call) -> float:  # what a backward repeats on lives as long as its graph
        return statistics.fmean(replay(captured, warm) for _ in range(REPLAYS))

    return sample


class Recorded:
    """A clock that plays recorded times back, for pytest-benchmark: it times one function after the other, and these
    have to take turns. ``now`` is its timer, ``play`` what it times."""

    def __init__(self) -> None:
        self.time, self.pending = 0.0, iter(())

    def load(self, times: list[float]) -> None:
        self.pending = iter(times)

    def now(self) -> float:
        return self.time

    def play(self) -> None:
        self.time += next(self.pending)


@functools.cache
def copy_bandwidth(device: str) -> float:
    """Bytes a second of a large copy on the device, read and written."""
    source = torch.randn(2**28 if device != "cpu" else 2**25, device=device)
    target = torch.empty_like(source)
    times = interleaved({"copy": wall(lambda i: target.copy_(source), device)}, rounds=20, seconds=2)
    return 2 * source.nbytes / statistics.median(times["copy"])


@functools.cache
def product_rate(device: str, dtype: torch.dtype) -> float:
    """Floating-point operations a second of torch's product of two large square matrices, at its fastest."""
    n = 8192 if device != "cpu" else 2048
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    times = interleaved({"product": wall(lambda i: torch.mm(a, b, out=out), device)}, rounds=20, seconds=2)
    return 2 * n**3 / min(times["product"])


# ---- memory and launches


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # malloc.h
_kept = False


def keep_memory(keep: bool = True) -> bool:
    """Whether this process keeps the memory that it frees, from now on; False where the system lets nobody choose
    (glibc does).

    Else a large tensor may get fresh pages, each of them a page fault; which call that meets depends on what the calls
    before it left.
    """
    global _kept
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    settings = {M_MMAP_MAX: 0, M_TRIM_THRESHOLD: 2**31 - 1}
    if not keep:  # every large block comes from the system, and goes back to it
        settings = {M_MMAP_MAX: 2**16, M_MMAP_THRESHOLD: 2**17, M_TRIM_THRESHOLD: 2**17}
    _kept = all([mallopt(*setting) for setting in settings.items()]) and keep
    return _kept


def saved_bytes(forward: Callable[[], object], parameters: set[int]) -> int:
    """What autograd keeps of a forward for its backward, each storage once, without those in ``parameters``."""
    held: dict[int, int] = {}

    def note(t: torch.Tensor) -> torch.Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in parameters:
            held[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        out = forward()
    del out
    return sum(held.values())


def peak_bytes(call: Callable[[], object], device: str) -> int | None:
    """How much memory a call takes at most beyond what is there before it, its results included; None where the
    system does not tell (a CPU without Linux's /proc)."""
    call()
    gc.collect()
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    kept = _kept
    keep_memory(False)
    try:  # in a thread of its own, and so in an arena without holes of memory that was kept
        with concurrent.futures.ThreadPoolExecutor(1) as thread:
            return thread.submit(_peak_of, call, torch.is_grad_enabled()).result()
    finally:
        keep_memory(kept)


def _peak_of(call: Callable[[], object], gradients: bool) -> int | None:
    torch.set_grad_enabled(gradients)
    call()
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what is free inside the process would hide what is asked for
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    except (OSError, AttributeError):
        return None
    before = _status("VmRSS")
    call()
    return max(0, _status("VmHWM") - before)


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def launches(call: Callable[[], object]) -> int:
    """How many kernels and copies one call starts on the GPU."""
    call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    on_device = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return sum("Sync" not in event.name for event in on_device)  # the calls of the host are recorded, too


# ---- the machine


def facts(device: str) -> dict[str, object]:
    """What a result has to stand beside: device, versions, commit, date."""
    said: dict[str, object] = {
        "device": torch.cuda.get_device_name() if device != "cpu" else cpu_name(),
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "routed_peft": routed_peft.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    if device != "cpu":
        said |= {"CUDA": torch.version.cuda, "nvidia-smi": gpu_facts()}
    else:
        said |= {"processor": cpu_model(), "threads": torch.get_num_threads()}
        said |= {"instruction set": routed_peft.build_info().get("cpu_isa", "none")}
        said |= {"freed memory": "kept, but where peaks are measured" if keep_memory() else "as the system has it"}
    return said | {"copy bandwidth, GB/s": round(copy_bandwidth(device) / 1e9, 1)}


def cpuinfo() -> dict[str, str]:
    """What Linux says of the first processor; nothing elsewhere."""
    try:
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        return {}
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first.splitlines())}


def cpu_model() -> str:
    """What tells processors apart that have the same name, as "family 26, model 2" (AMD's Zen 5)."""
    said = cpuinfo()
    return ", ".join(f"{key.removeprefix('cpu ')} {said[key]}" for key in ("cpu family", "model") if key in said)


def cpu_name() -> str:
    """The processor and how many of its cores this process may use."""
    name = cpuinfo().get("model name") or platform.processor() or platform.machine()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{name}, {cores} cores"


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
    """Of the sources, with "-dirty" where they are not it."""
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
