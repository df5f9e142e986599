"""The options of the benchmarks, and what a result says beside its times: the machine, and what did not run.

pytest benchmarks --benchmark-only
pytest benchmarks/bench_layer.py --benchmark-only --shapes gpt2,decode --peers routed_peft,eager,base
"""

import shlex
from collections import Counter

import measure
import outcome
import peers
import pytest
import torch

import routed_peft

notes: Counter[str] = Counter()  # why a cell has no time, and how many there are of it


def words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def pytest_addoption(parser):
    group = parser.getgroup("benchmarks of routed_peft")
    group.addoption("--device", choices=["cpu", "cuda"], help="the GPU where there is one")
    group.addoption("--size", choices=["small", "full"], help="of the shapes; full on a GPU, small on a CPU")
    group.addoption("--dtypes", type=words, help="float32,bfloat16 on a CPU, bfloat16 on a GPU")
    group.addoption("--peers", type=words, default=[*peers.PEERS], help="all")
    group.addoption("--clocks", type=words, help="all that the device has: wall on a CPU; graph, graph warm, wall")
    group.addoption("--shapes", type=words, default=[""], help="those whose name holds one of these words")
    group.addoption("--seconds", type=float, default=1.0, help="for the rounds of one group; it gets seven at least")


def pytest_configure(config):
    measure.keep_memory()
    option = config.option
    option.device = option.device or ("cuda" if torch.cuda.is_available() else "cpu")
    gpu = option.device == "cuda"
    torch.backends.cudnn.allow_tf32 = False  # as products are: one peer has a convolution
    option.size = option.size or ("full" if gpu else "small")
    option.dtypes = option.dtypes or (["bfloat16"] if gpu else ["float32", "bfloat16"])
    option.clocks = option.clocks or measure.CLOCKS[option.device]
    known_words = {"peers": peers.PEERS, "dtypes": measure.DTYPES, "clocks": measure.CLOCKS[option.device]}
    for name, known in known_words.items():
        given = getattr(option, name)
        if unknown := [word for word in given if word not in known]:
            raise pytest.UsageError(f"{', '.join(unknown)}: there are {', '.join(known)}")
    if gpu and not routed_peft.build_info().get("cuda"):
        raise pytest.UsageError(f"routed_peft has no CUDA kernels: {routed_peft.build_info()}")


@pytest.fixture
def device(pytestconfig):
    return pytestconfig.option.device


def pytest_runtest_logreport(report):
    if report.skipped and isinstance(report.longrepr, tuple):
        notes[report.longrepr[2].removeprefix("Skipped: ")] += 1
    elif report.failed:
        said = getattr(getattr(report.longrepr, "reprcrash", None), "message", str(report.longrepr))
        notes[f"FAILED {report.nodeid.rpartition('::')[2]}: {' '.join(said.split())[:300]}"] += 1


def pytest_benchmark_update_json(config, benchmarks, output_json):
    option = config.option
    given = [word for word in config.invocation_params.args if not str(word).startswith("--benchmark-json")]
    output_json["facts"] = measure.facts(option.device) | {
        "command": shlex.join(["pytest", *map(str, given)]), "size": option.size, "seconds a group": option.seconds
    }  # fmt: skip
    if used := {torch_dtype for name, torch_dtype in measure.DTYPES.items() if name in option.dtypes}:
        rates = {str(dtype).removeprefix("torch."): measure.product_rate(option.device, dtype) for dtype in used}
        output_json["facts"]["products, GFLOP/s"] = {name: round(rate / 1e9, 1) for name, rate in rates.items()}
    output_json["notes"] = [why if count == 1 else f"{why} ({count} cells)" for why, count in notes.items()]
    timed = [bench for bench in benchmarks if not bench.has_error]
    for bench, written in zip(timed, output_json["benchmarks"], strict=True):
        times = outcome.spread(bench.stats.data)
        written["stats"] |= {"p20": times["p20"], "p80": times["p80"]}
