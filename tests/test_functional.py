"""The operator: every gradient against finite differences, and the C++ library against the definition."""

import dataclasses
import itertools

import pytest
import torch
from cases import EVERY, ROUTED, Case, worst

from routed_peft.ops import KERNEL_DTYPES
from routed_peft.routes import ROUTES


def variants():
    """Every option of every route, one Case for each combination that can matter to a gradient."""
    for routing in EVERY:
        elementwise = ROUTES[routing].state == "tokens"
        for d_c, (slices, across) in itertools.product((None, 4), ((False, False), (True, False), (True, True))):
            form = dict(d_c=d_c, slices=slices, across=across)
            yield Case(routing, **form)  # the route's own pooling, several tokens
            if routing == "none":
                continue
            yield Case(routing, m=1, masked=True, pool="none", **form)
            yield Case(routing, pool="mean", masked=True, index=(1, 0, 1), batch=3, **form)
            if elementwise:
                yield Case(routing, m=5, pool="none", masked=True, **form)
            else:
                yield Case(routing, masked=True, scale="none", **form)
                yield Case(routing, pool="first", masked=True, **form)
        yield Case(routing, "base", d_c=4)
        for activation in ("gelu", "gelu_tanh", "relu", "silu", "none"):
            yield Case(routing, "adapter", activation=activation)
            if routing != "none":
                yield Case(routing, "adapter", activation=activation, d_c=4, masked=True)
        if routing == "none":
            continue
        yield Case(routing, "base", slices=True, pool="mean")
        yield Case(routing, "state", slices=True)
        yield Case(routing, "state", index=(1, 0, 1), batch=3, pool="mean", masked=True, d_c=4)
        for pool in ("auto", "mean", "none"):
            yield Case(routing, "lora", in_sequence=True, pool=pool)
        for across in (False, True):
            yield Case(routing, "lora", in_sequence=True, slices=True, across=across)
        yield Case(routing, "adapter", in_sequence=True)
        yield Case(routing, "lora", varlen=True, batch=3, d_c=4)
        yield Case(routing, "lora", varlen=True, batch=3, m=5, d_c=4, pool="none")
        yield Case(routing, "lora", varlen=True, in_sequence=True, batch=3)


VARIANTS = list(variants())


@pytest.mark.parametrize("case", VARIANTS, ids=str)
def test_gradients_match_finite_differences(case):
    t, constant = case.tensors()
    names = list(t)

    def run(*values):
        return case.run(dict(zip(names, values, strict=True)), constant, "cpu")

    assert torch.autograd.gradcheck(run, [v.requires_grad_() for v in t.values()], fast_mode=True, eps=1e-6, atol=1e-6)


@pytest.mark.parametrize("routing", EVERY)
def test_every_entry_of_every_gradient(routing):
    """gradcheck's slow mode, entry by entry, once a route and with dropout on."""
    for case in (Case(routing, d_c=4, n=3, d=4, dropout=0.4), Case(routing, "adapter", n=3, d=4, dropout=0.4)):
        t, constant = case.tensors()
        names = list(t)

        def run(*values, case=case, names=names, constant=constant):
            return case.run(dict(zip(names, values, strict=True)), constant, "cpu")

        assert torch.autograd.gradcheck(run, [v.requires_grad_() for v in t.values()])


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("case", VARIANTS, ids=str)
def test_cpu_is_the_reference(case, dropout):
    """Values and all gradients, with the very same dropout masks."""
    agree(dataclasses.replace(case, dropout=dropout))


@pytest.mark.parametrize("case", VARIANTS, ids=str)
def test_kernels_are_the_definition(case, kernels):
    """Values in every dtype the kernels know, from parameters of it and of float32, with dropout and without."""
    for dropout, dtype, parameters in itertools.product((0.0, 0.3), KERNEL_DTYPES, (None, torch.float32)):
        if dtype != parameters:
            right(dataclasses.replace(case, dropout=dropout, dtype=dtype, parameter_dtype=parameters), kernels)


@pytest.mark.parametrize("case", VARIANTS, ids=str)
def test_gradients_of_kernels_are_the_definitions(case, kernels):
    """Every option of every route, with the very same dropout masks; in float32, and in one of the shorter dtypes."""
    half = (torch.bfloat16, torch.float16)[VARIANTS.index(case) % 2]
    for dropout, dtype in ((0.0, torch.float32), (0.3, torch.float32), (0.3, half)):
        right(dataclasses.replace(case, dropout=dropout, dtype=dtype), kernels, gradients=True)


@pytest.mark.parametrize("routing", ROUTED)
@pytest.mark.parametrize("r", [1, 3, 12, 16, 100, 256])
@pytest.mark.parametrize("n, m", [(0, 7), (7, 0), (1, 63), (63, 65), (65, 1), (64, 64)])
def test_odd_shapes(routing, r, n, m):
    """N or M of 0, 1, 7, 63, 65 and odd ranks; at these sizes the gram routes take both of their orders."""
    agree(Case(routing, "lora", n=n, m=m, r=r, d=13, d_c=11, masked=m > 0))
    if n and ROUTES[routing].state == "tokens":
        agree(Case(routing, "lora", n=n, m=n, r=r, d=13, pool="none", masked=True))


@pytest.mark.thinned(3)
@pytest.mark.parametrize("routing", EVERY)
@pytest.mark.parametrize("r", [1, 12, 33, 100, 256])
def test_odd_shapes_on_kernels(routing, r, kernels):
    for n, m in ((0, 7), (7, 0), (1, 63), (63, 65), (65, 1), (130, 64)):
        case = Case(routing, "lora", n=n, m=m, r=r, d=13, d_c=None if routing == "none" else 11, masked=m > 0)
        for dtype in (torch.float32, torch.bfloat16):
            right(dataclasses.replace(case, dtype=dtype), kernels, gradients=True)
            if n and ROUTES[routing].state == "tokens":
                paired = dataclasses.replace(case, dtype=dtype, m=n, pool="none", masked=True)
                right(paired, kernels, gradients=True)


@pytest.mark.parametrize("routing", ["gram", "gram_relu"])
def test_both_gram_orders(routing):
    """R far above and far below 2NM/(N+M): T (VᵀV) and (T Vᵀ) V are the same function."""
    for r, n, m in ((100, 7, 9), (4, 200, 300), (90, 300, 20)):
        for options in ({}, {"masked": True, "index": (1, 0, 1), "batch": 3}, {"slices": True}, {"in_sequence": True}):
            agree(Case(routing, "lora", n=n, m=m, r=r, d=13, **options))


@pytest.mark.parametrize("routing", ["gram", "gram_relu"])
def test_both_gram_orders_on_kernels(routing, kernels):
    for r, n, m in ((100, 7, 9), (4, 200, 300), (90, 300, 20)):
        for options in ({}, {"masked": True, "index": (1, 0, 1), "batch": 3}, {"slices": True}, {"in_sequence": True}):
            for dtype in KERNEL_DTYPES:
                right(Case(routing, "lora", r=r, n=n, m=m, d=13, dtype=dtype, **options), kernels, gradients=True)


def right(case, backend, seed=0, gradients=False):
    """The output, and with ``gradients`` those too, are the float64 definition's of the same rounded inputs: in float32
    to its precision, in a shorter dtype as nearly as the definition itself computed in it, or to a few roundings."""
    low = case.dtype != torch.float32
    if gradients:
        want, got = case.gradients("reference", seed, torch.float64), case.gradients(backend, seed)
        theirs = case.gradients("reference", seed) if low else None
    else:
        t, constant = case.tensors(seed)
        want = {"out": case.exact(t, constant)}
        with torch.no_grad():
            got = {"out": case.run(t, constant, backend)}
            theirs = {"out": case.run(t, constant, "reference")} if low else None
    assert got["out"].dtype == case.dtype
    for name, exact in want.items():
        if exact is None:  # a tensor that takes no part
            assert got[name] is None or not got[name].any(), f"{name} of {case}"
            continue
        assert got[name].shape == exact.shape
        error = (got[name].double() - exact).norm()
        if theirs is None:
            assert worst(got[name], exact) < backend.close, f"{name} of {case}"
        elif exact.numel():
            size = exact.norm() + (name != "out")  # a gradient may cancel to much less than it is made of
            limit = max(1.5 * (theirs[name].double() - exact).norm(), 8 * torch.finfo(case.dtype).eps * size)
            assert error <= limit, f"{name} of {case}: off by {error:.1e}, limit {limit:.1e}"


def agree(case, tolerance=1e-11):
    want, got = case.gradients("reference"), case.gradients("cpu")
    for name in want:
        if want[name] is None or got[name] is None:
            given = want[name] if got[name] is None else got[name]
            assert given is None or not given.any(), f"{name}: a gradient on one side only"
            continue
        assert got[name].shape == want[name].shape
        assert worst(got[name], want[name]) < tolerance, name
