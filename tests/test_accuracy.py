"""The error gate: against float64 on the same rounded inputs, we may not be worse than clean eager PyTorch.

Errors are ‖got - want‖ / ‖want‖ for the output and each gradient. Where a tensor has 4,096 elements or more, the
geometric mean over the seeds of our error over eager's is at most 1.1; a smaller one is at most
max(1.5 · eager's, 8 eps) off.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from cases import EVERY, Case

from routed_peft import functional
from routed_peft.routes import ROUTES

SEEDS = 8


def eager(case, t):
    """The update (and base or residual) as one would write it, all in the tensors' own dtype."""
    a, c = t["A"], t.get("C", t["A"])
    h, y = F.linear(t["x"], a, t.get("b_down")), t.get("y")
    z = h
    if y is not None:
        g = F.linear(y, c, t.get("b_C", t.get("b_down")))
        if ROUTES[case.routing].pool == "mean":
            g = g.mean(1, keepdim=True)
        m = g.shape[1]
        if case.routing == "add":
            z = h + g
        elif case.routing == "mul":
            z = h * g
        elif case.routing == "expand":
            z = h @ g.expand(-1, g.shape[2], -1)
        elif case.routing == "gram":
            z = h @ g.mT @ g / m
        elif case.routing == "gram_relu":
            z = h.relu() @ g.relu().mT @ g / m
        elif case.routing == "cross_gram":
            z = (h @ h.sum(1, keepdim=True).mT) * g
        elif case.routing == "ones":
            z = (h @ g.mT).sum(-1, keepdim=True).expand_as(h) / m
    if case.form == "adapter":
        return t["x"] + F.linear(F.gelu(z), t["B"], t["b_up"])
    return F.linear(t["x"], t["W"], t["bias"]) + F.linear(z, t["B"]) * 0.7


def errors(case, seed, backend):
    """Our error and eager's for the output and every gradient, and how many numbers each of them has."""
    t, constant = case.tensors(seed)
    weights = torch.randn(*t["x"].shape[:-1], t["B"].shape[0], generator=torch.Generator().manual_seed(seed)).to(
        case.dtype
    )

    def everything(run, dtype):
        leaves = {k: v.to(dtype).requires_grad_() for k, v in t.items()}
        out = run(leaves)
        out.backward(weights.to(out.dtype))
        return {"out": out.detach(), **{k: v.grad for k, v in leaves.items()}}

    want = everything(lambda leaves: eager(case, leaves), torch.float64)
    theirs = everything(lambda leaves: eager(case, leaves), case.dtype)
    ours = everything(lambda leaves: case.run(leaves, constant, backend), case.dtype)

    def error(got, name):
        return ((got[name].double() - want[name]).norm() / want[name].norm()).item()

    return {name: (error(ours, name), error(theirs, name), want[name].numel()) for name in want}


@pytest.mark.thinned(5)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("form", ["linear", "adapter"])
@pytest.mark.parametrize("routing", EVERY)
def test_no_worse_than_eager(routing, form, dtype, native):
    case = Case(routing, form, batch=4, n=24, m=9, d=192, out=192, r=32, d_c=160, dtype=dtype)
    runs = [errors(case, seed, native) for seed in range(SEEDS)]
    eps = torch.finfo(dtype).eps
    for name in runs[0]:
        size = runs[0][name][2]
        if size >= 4096:
            ratio = math.exp(sum(math.log(max(run[name][0], 1e-30) / run[name][1]) for run in runs) / SEEDS)
            assert ratio <= 1.1, f"{name}: {ratio:.2f} times eager's error"
        else:
            for ours, theirs, _ in (run[name] for run in runs):
                assert ours <= max(1.5 * theirs, 8 * eps), f"{name}: {ours:.1e}, eager {theirs:.1e}"


@pytest.mark.thinned(3)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("routing", ["mul", "gram"])
def test_no_worse_than_eager_over_many_rows(routing, dtype, native):
    """Long sums over the rows, where the order of summation shows."""
    case = Case(routing, "linear", batch=2, n=1500, m=70, d=96, out=80, r=16, d_c=48, dtype=dtype)
    runs = [errors(case, seed, native) for seed in range(SEEDS)]
    for name in runs[0]:
        if name == "W" and native == "cuda":
            continue  # the vendor's product, against the CPU's library
        mean = [math.exp(sum(math.log(max(run[name][side], 1e-30)) for run in runs) / SEEDS) for side in (0, 1)]
        limit = 1.1 * mean[1] if runs[0][name][2] >= 4096 else max(1.5 * mean[1], 8 * torch.finfo(dtype).eps)
        assert mean[0] <= limit, f"{name}: {mean[0]:.1e}, eager {mean[1]:.1e}"


@pytest.mark.thinned(5)
@pytest.mark.parametrize("n, dtype", [(96, torch.bfloat16), (256, torch.float32)], ids=str)
@pytest.mark.parametrize("form", ["linear", "adapter"])
@pytest.mark.parametrize("routing", ["none", "mul", "gram"])
def test_no_worse_than_eager_in_large_products(routing, form, n, dtype, native):
    """Large enough for torch's library, and for tiles of numbers' parts (csrc/kernels/plan.h)."""
    case = Case(routing, form, batch=4, n=n, m=96, d=512, out=512, r=64, dtype=dtype)
    runs = [errors(case, seed, native) for seed in range(SEEDS)]
    for name in runs[0]:
        ratio = math.exp(sum(math.log(run[name][0] / run[name][1]) for run in runs if run[name][1]) / SEEDS)
        assert ratio <= (1.1 if runs[0][name][2] >= 4096 else 1.5), f"{name}: {ratio:.2f} times eager's error"


OPTIONS = [
    dict(form="state"),
    dict(form="lora", in_sequence=True),
    dict(form="lora", varlen=True),
    dict(form="linear", masked=True, dropout=0.1),
    dict(form="linear", index=(1, 0, 1, 2) * 3, slices=True),
    dict(form="adapter", masked=True, dropout=0.1),
]


@pytest.mark.thinned(5)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("routing", ["mul", "gram", "cross_gram", "expand"])
def test_no_worse_than_the_definition(routing, options, dtype, native):
    """The same gate for the options that eager has no short way of writing, against the definition itself."""
    case = Case(routing, **{"batch": 12, "n": 20, "m": 12, "d": 128, "r": 32, "d_c": None, "dtype": dtype, **options})
    logs = {}  # of both errors, seed by seed
    for seed in range(2 * SEEDS):
        want = case.gradients("reference", seed, torch.float64)
        sides = [case.gradients(who, seed) for who in (native, "reference")]
        for name, exact in want.items():
            if exact is not None:
                found = [((side[name].double() - exact).norm() / exact.norm()).item() for side in sides]
                logs.setdefault(name, []).append([math.log(error) for error in found])
    for name, pairs in logs.items():
        ours, theirs = (math.exp(sum(pair[side] for pair in pairs) / len(pairs)) for side in (0, 1))
        small = want[name].numel() < 4096
        limit = max(1.5 * theirs, 8 * torch.finfo(dtype).eps) if small else 1.1 * theirs
        assert ours <= limit, f"{name}: {ours:.1e}, the definition {theirs:.1e}"


@pytest.mark.parametrize("form", ["linear", "adapter"])
def test_bfloat16_parameters_do_not_round_a_float32_input(form, native):
    case = Case("mul", form, batch=4, n=96, d=512, out=512, r=64, dtype=torch.float32)
    t, constant = case.tensors()
    rounded = {k: v.bfloat16() if k in ("A", "B", "C") else v for k, v in t.items()}
    got, want = case.run(rounded, constant, native), case.exact(rounded, constant)
    assert (got.double() - want).norm() < 1e-5 * want.norm()


@pytest.mark.parametrize("d_c", [None, 256])
@pytest.mark.parametrize("routing", ["gram", "gram_relu", "mul"])
def test_of_a_float32_call_only_the_gradients_of_bfloat16_parameters_are_rounded(routing, d_c):
    case = Case(routing, "linear", batch=4, n=96, m=96, d=512, out=512, r=64, d_c=d_c, dtype=torch.float32)
    t, constant = case.tensors()
    t = {k: v.bfloat16() if k in ("A", "B", "C") else v for k, v in t.items()}
    weights = torch.randn(4, 96, 512)

    def gradients(backend, dtype=None):
        leaves = {k: v.to(dtype or v.dtype, copy=True).requires_grad_() for k, v in t.items()}
        out = case.run(leaves, constant, backend)
        return torch.autograd.grad(out, [leaves[k] for k in ("A", "B", "C") if k in leaves], weights.to(out.dtype))

    # A shared projection's gradient has two parts, which autograd of the definition rounds as well.
    limit = 1.5 if d_c is None else 1.05
    for got, want in zip(gradients("cpu"), gradients("reference", torch.float64), strict=True):
        assert got.dtype == torch.bfloat16
        assert (got.double() - want).norm() < limit * (want.bfloat16().double() - want).norm()


def test_the_state_of_a_bfloat16_condition_is_not_rounded(native):
    y, c = torch.randn(8, 96, 512).bfloat16(), torch.randn(64, 512) / 512**0.5
    c = c.bfloat16().float() if native.kernels else c  # which take parameters in the input's dtype
    for routing, pool in (("gram", "none"), ("mul", "none"), ("mul", "mean")):
        options = dict(routing=routing, pool=pool)
        given = functional.encode_condition(y.to(native.device), c.to(native.device), backend=native, **options)
        want = functional.encode_condition(y.double(), c.double(), **options).tensor
        assert (given.tensor.cpu().double() - want).norm() < 1e-5 * want.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("routing", EVERY)
def test_float32_parameters_under_half_precision(routing, dtype):
    """Parameters keep their own dtype, and so do their gradients: nothing of them is rounded on a CPU."""
    case = Case(routing, "linear", n=24, d=64, out=48, r=8, d_c=40, dtype=dtype, parameter_dtype=torch.float32)
    got, want = case.gradients("cpu"), case.gradients("cpu", dtype=torch.float64)
    for name, tensor in got.items():
        if tensor is None:
            continue
        assert tensor.dtype == (dtype if name in ("out", "x", "y", "W") else torch.float32)
        assert (tensor.double() - want[name]).norm() < 3 * torch.finfo(dtype).eps * want[name].norm(), name


def test_large_magnitudes(native):
    """Unscaled gram of thousands of tokens overflows float16 in Z; kept in float32, the output is still right."""
    case = Case("gram", "lora", n=8, m=4000, d=64, out=32, r=8, scale="none", dtype=torch.float16)
    t, constant = case.tensors()
    t["x"] *= 20
    t["B"] *= 2.0**-12
    got, want = case.run(t, constant, native).double(), case.exact(t, constant)
    assert (want.abs().max() * 2.0**12) > 65504 and got.isfinite().all()
    assert (got - want).norm() < 4e-3 * want.norm()
