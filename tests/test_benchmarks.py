"""The benchmarks: peers are what they say, and a run becomes a result, its pages and README's section."""

import csv
import json
import math
import os
import re
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from routed_peft import functional, ops

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"
sys.path.append(str(BENCHMARKS))

import bench_planner  # noqa: E402
import measure  # noqa: E402
import model  # noqa: E402
import outcome  # noqa: E402
import pages  # noqa: E402
import peers  # noqa: E402
import report  # noqa: E402
import shapes  # noqa: E402


def tiny(name, **changes):
    """A shape of the table, as small as it can be and still be itself."""
    shape = shapes.SMALL[name]
    out = 16 * (shape.out // shape.d if shape.merged else 2)
    return replace(shape, batch=2, n=5, d=16, out=out, r=4, m=min(shape.m, 3), **changes)


TINY = {
    "add": tiny("gpt2-add"),
    "mul": tiny("roberta-mul"),
    "mul, pooled": tiny("llava-mul"),
    "expand": tiny("gpt2-expand"),
    "gram": tiny("gpt2-gram"),
    "gram, one token": tiny("gpt2-long-gram"),
    "gram, cached": tiny("decode-8-gram"),
    "mul, cached": tiny("decode-64-mul"),
}


@pytest.mark.parametrize("shape", TINY.values(), ids=TINY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("peer", [name for name in peers.ROUTED if name != "compile"])
def test_a_peer_is_the_layer(peer, dtype, shape):
    peers.check(peer, shape, dtype, "cpu")


def test_a_compiled_peer_is_the_layer():
    peers.check("compile", TINY["mul"], torch.float32, "cpu")


WRONG = {
    "output": lambda out, layer: out * 1.001,
    "gradient": lambda out, layer: out.detach() + (out - out.detach()) * 1.001,
    "gradient of A": lambda out, layer: out + (layer.A - layer.A.detach()).sum() * 0.1,
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_a_wrong_peer_is_found_out(monkeypatch, wrong):
    def peer(layer):
        right = peers.eager(layer)
        return lambda x: wrong(right(x), layer)

    monkeypatch.setitem(peers.ROUTED, "eager", peer)
    with pytest.raises(AssertionError, match="eager on mul.*is off by"):
        peers.check("eager", TINY["mul"], torch.float32, "cpu")


@pytest.mark.parametrize("name", peers.FLOORS)
def test_a_floor_runs_or_says_why_not(name):
    """It computes another function, but of the same sizes, and what it trains gets gradients."""
    layer = peers.Layer(TINY["mul"], torch.bfloat16, "cpu")
    try:
        forward = peers.FLOORS[name](layer)
    except peers.Unavailable as why:
        assert name in ("lorafusion", "unsloth") and "GPU" in str(why) or "not installed" in str(why)
        return
    out, x = forward(layer.x[0]), layer.x[0]
    assert out.shape == layer.dout[0].shape
    learned = peers.trained(name, layer, forward)
    assert len(learned) == (0 if name == "base" else 2)
    assert all(g is not None for g in torch.autograd.grad(out, (x, *learned), layer.dout[0]))


def test_peers_take_turns():
    order = []

    def sample(name):
        return lambda: order.append(name) or float(len(order))

    times = measure.interleaved({name: sample(name) for name in "abc"}, rounds=40, seconds=60)
    assert order[:3] == [*"abc"]  # the first round, which does not count
    rounds = ["".join(order[i : i + 3]) for i in range(3, len(order), 3)]
    assert len(rounds) == 40 and {*rounds} == {"abc", "acb", "bac", "bca", "cab", "cba"}
    assert times["a"] == [4 + 3 * i + taken.index("a") for i, taken in enumerate(rounds)]
    assert {len(mine) for mine in times.values()} == {40}


@pytest.mark.parametrize(("once", "calls", "found"), [(0.5e-3, 5, 0.5e-3), (5e-3, 2, 5e-3), (60e-3, 1, 120e-3)])
def test_a_short_call_is_not_timed_just_behind_another(monkeypatch, once, calls, found):
    """The first call after another peer's takes twice as long here, and of a short one it is not timed."""
    clock, made = [0.0], []

    def call(i):
        clock[0] += once if made else 2 * once
        made.append(i)

    monkeypatch.setattr(measure.time, "perf_counter", lambda: clock[0])
    sample = measure.wall(call, "cpu")
    made.clear()
    assert sample() == pytest.approx(found)
    assert len(made) == calls


def test_rounds_start_at_every_depth_of_a_chunk_of_the_stack():
    depths = []

    def sample():
        frame, depth = sys._getframe(), 0
        while frame is not None:
            frame, depth = frame.f_back, depth + 1
        depths.append(depth)
        return 0.0

    measure.interleaved({"a": sample, "b": sample}, rounds=measure.CHUNK_FRAMES, seconds=60)
    first, *rounds = [depths[i] - depths[0] for i in range(0, len(depths), 2)]
    assert first == 0 and len({*rounds}) == len(rounds) == max(rounds) - min(rounds) + 1
    assert depths[::2] == depths[1::2]  # both peers of a round


@pytest.mark.parametrize("kept", [False, True])
def test_a_peak_is_what_is_held_at_once(kept):
    """Also where the process keeps what it frees, in holes that the next block does not fit into."""

    def call():
        a, b = torch.ones(2_000_000), torch.ones(2_100_000)
        c = torch.ones(4_000_000)
        del a, b
        return c, torch.ones(6_000_000)

    done = measure.keep_memory(kept)
    try:
        found = measure.peak_bytes(call, "cpu")
        if found is not None:  # the system tells
            assert 39e6 < found < 41e6  # the system counts in lots of pages
        assert measure._kept == done  # peak_bytes leaves it as it was
    finally:
        measure.keep_memory(False)


def test_a_slow_group_gets_seven_rounds():
    times = measure.interleaved({name: lambda: 1.0 for name in "ab"}, rounds=50, seconds=0)
    assert times == {"a": [1.0] * 7, "b": [1.0] * 7}


def test_a_step_is_forward_and_backward():
    for shape in shapes.FULL.values():
        forward, backward = (model.moved_bytes(shape, way, 2) for way in ("forward", "backward"))
        assert model.moved_bytes(shape, "step", 2) == forward + backward
        # Reading x and W and writing the output is the least of it; a few R-wide products are the most of the rest.
        least = 2 * (shape.tokens * (shape.d + shape.out) + shape.d * shape.out)
        assert least < forward < 4 * least + 2 * shape.batch * shape.m * shape.d
        assert model.flops(shape, "forward") > 2 * shape.tokens * shape.d * shape.out


def test_the_predictions_are_those_of_the_model(tmp_path, monkeypatch):
    monkeypatch.setattr(model, "RESULTS", tmp_path)
    model.main()
    assert (tmp_path / "predicted.md").read_text() == (BENCHMARKS / "results" / "predicted.md").read_text()


# ---- a run and its report


def run_benchmarks(written, file, *options):
    """Runs a file of benchmarks on the CPU; ``written`` is where pytest-benchmark shall write to."""
    command = [sys.executable, "-m", "pytest", f"benchmarks/{file}", "-q", "-p", "no:cacheprovider", "--benchmark-only"]
    command += ["--device=cpu", "--seconds=0", f"--benchmark-json={written}", *options]
    # Where it sees that these tests run in several processes, pytest-benchmark times nothing.
    alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    run = subprocess.run(command, cwd=ROOT, env=alone, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """What pytest-benchmark wrote of a training layer, a cached one and a point of a sweep."""
    written = tmp_path_factory.mktemp("run") / "bench.json"
    options = ["--shapes=gpt2-mul,decode-1-gram,sweep-m-4", "--peers=routed_peft,eager,peft default,base"]
    run_benchmarks(written, "bench_layer.py", *options, "--dtypes=float32")
    return json.loads(written.read_text()), written


def test_a_run_has_every_cell_with_its_numbers(ran):
    raw, _ = ran
    ways = [("gpt2-mul", way) for way in model.WAYS] + [("decode-1-gram", "forward"), ("sweep-m-4", "step")]
    found = {(b["extra_info"]["name"], b["extra_info"]["way"], b["extra_info"]["peer"]) for b in raw["benchmarks"]}
    assert found == {(*way, peer) for way in ways for peer in ("routed_peft", "eager", "base")}
    for bench in raw["benchmarks"]:
        info, stats = bench["extra_info"], bench["stats"]
        assert stats["rounds"] == measure.LEAST_ROUNDS == len(info["rounds"])
        assert statistics.median(info["rounds"]) == pytest.approx(stats["median"])
        assert 0 < stats["min"] <= stats["p20"] <= stats["median"] <= stats["p80"] <= stats["max"]
        assert info["model_bytes"] > 0 and info["floor_seconds"] > 0
        assert ("saved_bytes" in info) == (info["way"] == "step")
        if info["way"] == "step" and info["peer"] != "base":
            assert info["saved_bytes"] >= info["tokens"] * info["shape"]["d"] * 4  # x, if nothing else
    assert {"device", "torch", "commit", "date", "threads", "copy bandwidth, GB/s"} <= set(raw["facts"])
    assert any("the same as peft in float32" in note for note in raw["notes"])


def test_a_run_becomes_a_result_and_its_pages(ran, tmp_path, monkeypatch):
    raw, written = ran
    monkeypatch.setattr(sys, "argv", ["report.py", str(written), "--out", str(tmp_path)])
    report.main()
    result = outcome.load([written])
    again = outcome.load([tmp_path / f"{result.name}.json"])
    assert (again.facts, again.notes, again.shapes, again.rows) == (
        result.facts, result.notes, result.shapes, result.rows
    )  # fmt: skip
    with (tmp_path / f"{result.name}.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(raw["benchmarks"])
    page = (tmp_path / "README.md").read_text()
    for words in ("gpt2-mul", "decode-1-gram", "### step, float32, wall", result.facts["torch"], "--shapes=gpt2-mul"):
        assert words in page
    pictures = re.findall(r"!\[\w+\.png\]\((\w+\.png)\)", page)
    assert pictures == ["roofline.png", "ratios.png", "m.png", "memory.png"]
    for name in pictures:
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG") and (tmp_path / name).stat().st_size > 5000


def made_up(**given):
    """A result with one group; of each peer the samples, or one number that they all are."""
    shape = shapes.SMALL["gpt2-add"]
    said = dict(kind="layer", name=shape.name, dtype="float32", way="step", clock="wall", device="cpu")
    said |= dict(model_bytes=1e6, model_flops=1e9, floor_seconds=1e-3, saved_bytes=1e6, peak_bytes=None, n=3)
    rows = [
        said | dict(peer=peer, runs=[times]) | outcome.spread(times)
        for peer, times in ((peer, one if isinstance(one, list) else [one] * 12) for peer, one in given.items())
    ]
    about = dict(shape=vars(shape), family=shape.family, text=str(shape), tokens=shape.tokens, M=1, R=shape.width)
    facts = {
        "command": "pytest",
        "device": "a CPU",
        "date": "2026-01-01",
        "commit": "abc",
        "torch": "2",
        "copy bandwidth, GB/s": 10.0,
    }
    return outcome.Result(facts, [], {shape.name: about}, rows)


def test_a_cell_that_is_lost_is_shown():
    result = made_up(routed_peft=2e-3, eager=3e-3, aten=1.5e-3, base=1e-3)
    page, block = pages.page(result, [], ["another"]), pages.readme_block(result)
    assert "Beside it: [another](another.json)." in page
    for text in (page, block):
        assert "1.5 ms, **0.75**" in text  # aten
        assert "3 ms, 1.50" in text  # eager
    lost = "* gpt2-add, float32, step, wall: 0.75 (0.75–0.75)"
    assert "Slower than aten by more than 3% in 1 of 1 groups, in 1 of them by the whole" in page and lost in page
    assert "| gpt2-add | float32 | step | wall | layer against aten | 0.97 | **0.75** |  |" in page
    # the adapter, at 2.0 times eager's, is not missed
    assert "1 of 2 aims missed, 1 of them by the whole interval" in page
    block = " ".join(block.split())
    assert "slower than aten by more than 3% in 1 of 1" in block and "in 1 of them by the whole interval" in block


def test_a_cell_that_is_won_is_no_loss():
    result = made_up(routed_peft=2e-3, eager=3e-3, aten=1.97e-3, base=1e-3)  # within the spread
    assert outcome.lost(result, "aten") == {}
    assert "0 of 2 aims missed" in pages.page(result, [])
    assert "in 0 of 1 groups" in " ".join(pages.readme_block(result).split())


def test_a_median_s_interval_leaves_one_case_in_twenty_at_most():
    """The binomial distribution's, counted out: how often the median of a continuous distribution is beyond a bound."""
    for n in (6, 7, 11, 20, 50):
        value, low, high = outcome.estimate(list(range(n, 0, -1)))
        assert value == (n + 1) / 2 and low + high == n + 1
        misses = sum(math.comb(n, k) for k in range(low)) / 2**n  # fewer than `low` samples below the median
        assert misses <= 0.025 < misses + math.comb(n, low) / 2**n
    assert outcome.estimate([3.0, 1.0, 2.0]) == (2.0, 1.0, 3.0)


def test_rounds_that_disagree_leave_a_doubt():
    """Compared within the round: the machine's slow half tells nothing of the peers."""
    slow = [1.0] * 6 + [2.0] * 6
    shaky = [0.9 if i % 3 else 1.2 for i in range(12)]
    result = made_up(routed_peft=slow, eager=3.0, aten=[t * s for t, s in zip(slow, shaky, strict=True)], base=0.5)
    group = next(iter(result.groups().values()))
    assert outcome.ratio(group, "aten") == pytest.approx((0.9, 0.9, 1.2))
    slower = outcome.lost(result, "aten")
    assert len(slower) == 1 and outcome.surely(slower) == 0
    page = pages.page(result, [])
    assert "0.90 (0.90–1.20)" in page and "| layer against aten | 0.97 | **0.90** | yes |" in page
    adapter = made_up(routed_peft=2.0, eager=[2.1] * 7 + [2.4] * 5, base=1.0)  # 1.1 times ours, and 1.4 in five rounds
    assert [(aim.reached, aim.surely_missed) for aim in outcome.aims(adapter)] == [(pytest.approx(1.1), False)]
    adapter = made_up(routed_peft=2.0, eager=[2.1] * 11 + [2.4], base=1.0)
    assert [aim.surely_missed for aim in outcome.aims(adapter)] == [True]


def test_an_adapter_that_comes_free_has_met_its_aim():
    result = made_up(routed_peft=1e-3, eager=3e-3, base=1.2e-3)
    assert outcome.adapter_ratio(next(iter(result.groups().values()))) == float("inf")
    page = pages.page(result, [])
    assert "0 of 1 aims missed" in page and "| – | ∞ |" in page


def test_parts_of_different_machines_do_not_mix(tmp_path):
    files = []
    for device in ("one", "another"):
        result = made_up(routed_peft=1e-3)
        result.facts["device"] = device
        files.append(tmp_path / f"{device}.json")
        outcome.write_json(result, files[-1])
    with pytest.raises(SystemExit, match="device is another, of the files before one"):
        outcome.load(files)


def test_peers_of_different_runs_are_not_compared(tmp_path):
    files = [tmp_path / "ours.json", tmp_path / "theirs.json"]
    for path, result in zip(files, (made_up(routed_peft=1e-3), made_up(eager=1e-3)), strict=True):
        outcome.write_json(result, path)
    refused = r"theirs.json: gpt2-add, float32, step, wall was run with eager, in a file before it with routed_peft"
    with pytest.raises(SystemExit, match=refused):
        outcome.load(files)
    old = made_up(routed_peft=1e-3)
    del old.rows[0]["runs"]
    outcome.write_json(old, files[0])
    with pytest.raises(SystemExit, match="has no rounds to compare peers by; measure it again"):
        outcome.load(files[:1])


def test_several_runs_count_by_their_medians(tmp_path):
    """However many rounds one of them has: within a run they all lean to the same side."""
    files = [tmp_path / f"{run}.json" for run in range(6)]
    for path, times in zip(files, (0.9, 0.9, 0.95, 1.0, 1.1, 1.2), strict=True):
        count = 30 if times < 1 else 7
        aten = [times * 1e-3] * (count - 1) + [5e-3]
        run = made_up(routed_peft=[1e-3] * count, eager=[2e-3] * count, aten=aten)
        run.facts |= {"copy bandwidth, GB/s": 10 * times, "products, GFLOP/s": {"float32": 100 * times}}
        outcome.write_json(run, path)
    result = outcome.load(files)
    assert result.facts["copy bandwidth, GB/s"] == 9.8 and result.facts["products, GFLOP/s"] == {"float32": 97.5}
    (group,) = result.groups().values()
    assert outcome.ratio(group, "aten") == pytest.approx((0.975, 0.9, 1.2))
    assert outcome.lost(result, "aten") == {}
    assert group["aten"]["n"] == 3 * 30 + 3 * 7 and group["aten"]["median"] == 0.9e-3
    assert result.samples == (6, "runs") and result.facts["command"] == "pytest"
    assert "certainty of 95%; it is that of 6 runs, each a process" in " ".join(pages.page(result, []).split())
    outcome.write_json(result, files[0])
    assert outcome.load(files[:1]).rows == result.rows
    twice = made_up(routed_peft=1e-3)
    twice.rows *= 2
    outcome.write_json(twice, files[1])
    with pytest.raises(SystemExit, match="1.json: a cell is there twice"):
        outcome.load(files[1:2])
    outcome.write_json(made_up(routed_peft=1e-3, eager=2e-3, aten=0.9e-3), files[1])
    assert outcome.load(files[1:4]).samples == (3, "runs") and outcome.certainty(3) == 0.75
    result.rows = [row for row in result.rows if row["peer"] != "aten"]
    outcome.write_json(result, files[0])
    with pytest.raises(SystemExit, match="peers are compared within a run"):
        outcome.load(files[:2])


def test_other_kinds_get_a_table():
    result = made_up(routed_peft=1e-3, base=1e-3)
    times = dict(min=1e-3, p20=1e-3, median=2e-3, p80=3e-3, n=3)
    result.rows += [
        dict(kind="model", form="llava", peer=peer, met=met, **times) for peer, met in (("a", True), ("b", False))
    ]
    page = pages.page(result, [])
    assert "## Model\n\n| form | peer | met | median |" in page
    assert "| llava | b | **no** | 2 ms |" in page


# ---- the planner


def run_planner(tmp_path, shapes):
    written = tmp_path / "planner.json"
    run_benchmarks(written, "bench_planner.py", f"--shapes={shapes}")
    return outcome.load([written])


def test_the_planner_is_timed_every_way(tmp_path):
    rows = run_planner(tmp_path, "gram_order-gram-64x32-128-r16-m8,by_lines-mul-1x1-256-r16").of_kind("planner")
    assert {(row["choice"], row["dtype"], row["way"]) for row in rows} == {
        *(("gram_order", dtype, way) for dtype in ("float32", "bfloat16") for way in ("forward", "step")),
        *(("by_lines", dtype, "forward") for dtype in ("float32", "bfloat16")),
    }
    for row in rows:
        assert set(row["ways"]) == set(bench_planner.CHOICES[row["choice"]].ways.values())
        assert row["ways"][row["best"]] == min(row["ways"].values()) > 0
        assert row["off"] == pytest.approx(row["median"] / min(row["ways"].values()), rel=0.01)


def test_a_forced_call_is_the_layer_all_the_same():
    """Where the two ways keep other things for the backward, it shows that the choice was taken."""
    kept = {}
    for choice, about in bench_planner.CHOICES.items():
        shape = replace(next(bench_planner.shapes_of(choice)), n=9, d=16, out=16)
        cell = bench_planner.Cell(choice, shape, "float32", "step")
        layer, gradients = peers.Layer(shape, torch.float32, "cpu"), {}
        call = bench_planner.call_of(cell, layer)
        for value in (bench_planner.PLANNED, *about.ways):
            ops.extension.force(choice, value)
            try:
                gradients[value] = call(0)
                out = functional.routed_lora(
                    layer.x[0], layer.A, layer.y, layer.B, routing=shape.routing, scaling=peers.SCALING
                )
            finally:
                ops.extension.force(choice, bench_planner.PLANNED)
            saved = [None if t is None else tuple(t.shape) for t in out.grad_fn.saved_tensors]
            kept.setdefault(choice, {})[value] = saved
        for value in about.ways:
            torch.testing.assert_close(gradients[value], gradients[bench_planner.PLANNED], rtol=1e-4, atol=1e-4)
    for choice in ("rank_one", "gram_order"):
        assert kept[choice][0] != kept[choice][1]
        assert kept[choice][bench_planner.PLANNED] in (kept[choice][0], kept[choice][1])


def test_a_choice_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="no choice 'gram'"):
        ops.extension.force("gram", 1)
    for choice, value in (("gram_order", 2), ("rank_one", -2), ("reduction_splits", 0), ("reduction_splits", 17)):
        with pytest.raises(ValueError, match=f"value {value} is none of {choice}"):
            ops.extension.force(choice, value)


def test_a_bad_choice_is_shown():
    result = made_up(routed_peft=1e-3, base=1e-3)
    times = dict(min=1e-3, p20=1e-3, median=2e-3, p80=3e-3, n=3)
    said = dict(kind="planner", choice="gram_order", call="gram, 64 tokens", batch=8, dtype="float32", way="step")
    for off in (1.04, 2.0):
        result.rows.append(said | times | dict(off=off, best="through S", ways={"through S": 1e-3, "through V": 2e-3}))
    page = pages.page(result, [])
    assert "| gram_order | through S, through V | 2 | 1 | 2.00 |" in page
    bad = "batch 8, gram, 64 tokens | float32 | step | through S: 1 ms, through V: 2 ms | 2 ms | **2.00** |"
    assert page.count("batch 8") == 1 and f"| gram_order | {bad}" in page


def test_the_readme_says_what_its_result_says():
    readme = (ROOT / "README.md").read_text()
    block = readme[readme.index(pages.MARKS[0]) : readme.index(pages.MARKS[1]) + len(pages.MARKS[1])]
    name = re.search(r"`(benchmarks/results/[^`]+\.json)`", block)[1]
    assert block == pages.readme_block(outcome.load([ROOT / name]))
