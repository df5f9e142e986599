"""The autograd node: dtypes, which gradients are computed, what is saved; and ConditionState, which gradients cross."""

import copy
import itertools
import math
from collections import Counter

import pytest
import torch
from layers import DC, NAMES, OUT, B, D, M, N, R, adapter, assert_same, inputs, linear_leaves, lora, results
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import routed_peft as rp
from routed_peft import functional

OPS = torch.ops.routed_peft


# ------------------------------------------------------------------------------------------------ dtypes
@pytest.mark.parametrize("make", [lora, adapter])
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_autocast(make, low):
    layer, (x, y) = make(), inputs()
    wanted = results(lambda: layer(x, y), layer, x, y)
    with torch.autocast("cpu", dtype=low):
        got = results(lambda: layer(x, y), layer, x, y)
        state = layer.encode_condition(y)
        assert layer(x, state).dtype == got[0].dtype
    # The base layer's, which takes part; but a residual goes through from layer to layer.
    assert got[0].dtype == (low if make is lora else torch.float32) and state.tensor.dtype == torch.float32
    assert all(g.dtype == torch.float32 for g in got[1:])  # x, y and the parameters are
    for a, b in zip(got, wanted, strict=True):
        assert (a - b).norm() < 0.05 * b.norm()


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_autocast_leaves_the_residual_alone(low, backend):
    layer, y = rp.RoutedAdapter(D, R, condition_features=DC, backend=backend), torch.randn(B, M, DC)
    x = torch.randn(B, N, D, requires_grad=True)
    with torch.autocast("cpu", dtype=low):
        for out in (layer(x, y), layer(x, layer.encode_condition(y))):
            assert torch.equal(out, x)  # up is zero
            assert torch.equal(torch.autograd.grad(out.sum(), x)[0], torch.ones_like(x))
        with torch.no_grad():
            assert torch.equal(layer(x, y), x)
            assert torch.equal(layer(x.to(low), y), x.to(low))
        layer.residual = False
        assert layer(x, y).dtype == low


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_base_dtype(dtype):
    torch.manual_seed(1)
    layer, (x, y) = lora(dtype=dtype), inputs(dtype=dtype)
    parameter = torch.float64 if dtype == torch.float64 else torch.float32
    assert {p.dtype for p in (layer.lora_A, layer.lora_B, layer.condition_A)} == {parameter}
    got = results(lambda: layer(x, y), layer, x, y)
    assert layer.encode_condition(y).tensor.dtype == parameter
    for tensor, like in zip(got, [x, x, y, *layer.parameters()], strict=True):
        assert tensor.dtype == like.dtype
    wide = copy.deepcopy(layer).double()
    x64, y64 = (t.detach().double().requires_grad_() for t in (x, y))
    for a, b in zip(got, results(lambda: wide(x64, y64), wide, x64, y64), strict=True):
        assert (a - b).norm() <= (1e-12 if dtype == torch.float64 else 0.05) * b.norm()


# ------------------------------------------------------------------------------------------------ gradients, memory
class Backwards(TorchDispatchMode):
    """Records what the backward op was asked for and how many elements each answer has."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is OPS.backward.default:
            self.needs, self.sizes = args[0], [t.numel() for t in out]
        return out


def saved_by(call):
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        call()
    return saved


ALL = list(itertools.product([False, True], repeat=7))


@pytest.mark.parametrize(
    "routing, dropout, subsets", [("gram", 0.0, ALL), *((name, 0.3, ALL[1::9]) for name in NAMES if name != "none")]
)
def test_only_wanted_gradients_are_computed(routing, dropout, subsets):
    values = linear_leaves(torch.float64)  # a subset may be computed in another order
    options = {"routing": routing, "scaling": 0.5, "dropout_p": dropout, "seed": torch.tensor([11])}

    def gradients(wanted):
        x, A, up, y, C, W, bias = (v.clone().requires_grad_(want) for v, want in zip(values, wanted, strict=True))
        leaves = [t for t in (x, A, up, y, C, W, bias) if t.requires_grad]
        out = functional.routed_linear(x, W, bias, y, A, up, C, **options)
        assert out.requires_grad == any(wanted)
        return iter(torch.autograd.grad(out.square().sum(), leaves) if leaves else ())

    full = list(gradients([True] * 7))
    for wanted in subsets:
        with Backwards() as seen:
            got = gradients(wanted)
        for i, want in enumerate(wanted):
            if want:
                torch.testing.assert_close(next(got), full[i], msg=lambda m, w=wanted, i=i: f"input {i} of {w}: {m}")
        if any(wanted):
            assert seen.needs == sum(1 << i for i, want in enumerate(wanted) if want)
            assert seen.sizes == [v.numel() * want for v, want in zip(values, wanted, strict=True)] + [0, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "routing, frozen, m, saved_in_dtype, saved_in_float32",
    [  # what is saved apart from the arguments and the seed: T, the state, and what the gradient of the condition needs
        ("gram", False, M, [(B * N, R), (B * M, R)], []),  # V and no S: the forward went through V
        ("gram", False, 40, [(B * N, R), (B * 40, R)], [(B, R, R)]),
        ("gram", True, M, [(B * N, R)], [(B, R, R)]),
        ("gram_relu", False, 40, [(B * N, R), (B * 40, R)], [(B, R, R)]),
        ("mul", False, M, [(B * N, R)], [(B, R), (B, DC)]),
        ("mul", True, M, [(B * N, R)], [(B, R)]),
        ("cross_gram", False, M, [(B * N, R)], [(B, R), (B, DC)]),
        ("expand", False, M, [], [(B * N, 1), (B, R), (B, DC)]),
        ("gram", False, 1, [], [(B * N, 1), (B, R), (B, DC)]),
        ("none", False, M, [(B * N, R)], []),
    ],
)
def test_what_a_layer_saves(routing, frozen, m, saved_in_dtype, saved_in_float32, dtype, native):
    """No dropped copy of x, no mask, no Z and no update: T, and what the condition's gradient needs."""
    n = 40 if m == 40 else N
    shapes = ((B, n, D), (R, D), (OUT, R), (B, m, DC), (R, DC), (OUT, D), (OUT,))
    x, A, up, y, C, W, bias = (torch.randn(*shape, dtype=dtype, device=native.device) for shape in shapes)
    for t in (x, A, up, W, bias, *(() if frozen else (y, C))):
        t.requires_grad_()
    used = [x, A, up, W, bias] if routing == "none" else [x, A, up, W, bias, y, C]
    options = {"routing": routing, "scaling": 1.0, "dropout_p": 0.3, "backend": native}
    saved = saved_by(
        lambda: functional.routed_linear(x, W, bias, y, A, up, None if routing == "none" else C, **options)
    )
    given = {t.data_ptr() for t in used}
    assert Counter(t.data_ptr() for t in saved if t.data_ptr() in given) == Counter(given)  # by reference, once each
    own = [t for t in saved if t.data_ptr() not in given and t.numel()]
    wanted = [(shape, dtype) for shape in saved_in_dtype] + [(shape, torch.float32) for shape in saved_in_float32]
    wanted = [((n * shape[0] // N if shape[0] == B * N else shape[0], *shape[1:]), kind) for shape, kind in wanted]
    assert Counter((tuple(t.shape), t.dtype) for t in own) == Counter([*wanted, ((1,), torch.int64)])
    numbers = sum(math.prod(shape) * kind.itemsize for shape, kind in wanted)
    assert sum(t.untyped_storage().nbytes() for t in own) == numbers + 8


@pytest.mark.parametrize("pool, saved_in_float32", [("none", [(B, R, R)]), ("mean", [(B * N, 1), (B, R), (B, D)])])
def test_what_a_layer_saves_in_sequence(pool, saved_in_float32, native):
    """V is rows of T."""
    x, A, up, *_, bias = (t.to(native.device).requires_grad_() for t in linear_leaves())
    mask = (torch.arange(N, device=native.device) % 2 == 0).expand(B, N)
    saved = saved_by(
        lambda: functional.routed_lora(
            x, A, None, up, routing="gram", scaling=1.0, mask=mask, pool=pool, backend=native
        )
    )
    given = {t.data_ptr() for t in (x, A, up)}
    own = [t for t in saved if t.data_ptr() not in given and t.numel() and t.dtype != torch.bool]
    wanted = saved_in_float32 + ([(B * N, R)] if pool == "none" else [])
    assert Counter(tuple(t.shape) for t in own) == Counter(wanted)
    assert sum(t.untyped_storage().nbytes() for t in own) == 4 * sum(math.prod(shape) for shape in wanted)


def test_a_state_is_saved_by_reference():
    x, A, up, y, C, *_ = (t.requires_grad_() for t in linear_leaves())
    state = functional.encode_condition(y, C, routing="gram")
    saved = saved_by(lambda: functional.routed_lora(x, A, state, up, C, routing="gram", scaling=1.0))
    given = {t.data_ptr() for t in (x, A, up, state.tensor)}
    assert sorted(tuple(t.shape) for t in saved if t.data_ptr() not in given) == [(0,), (0,), (B * N, R)]


# ------------------------------------------------------------------------------------------------ ConditionState
def test_the_state_is_a_pytree():
    layer, (x, y) = lora(), inputs()
    state = layer.encode_condition(y)
    leaves, spec = pytree.tree_flatten(state)
    assert len(leaves) == 1 and leaves[0] is state.tensor
    back = pytree.tree_unflatten(leaves, spec)
    assert (back.routing, back.versions) == (state.routing, state.versions) and back.tensor is state.tensor
    (path, leaf), = pytree.tree_flatten_with_path({"c": state})[0]  # fmt: skip
    assert pytree.keystr(path) == "['c'].tensor" and leaf is state.tensor
    with torch.no_grad():
        layer.condition_A.add_(1)
    with pytest.raises(rp.StaleStateError):  # a way through a pytree does not make a state fresh
        layer(x, pytree.tree_map(lambda t: t.clone(), state))
    later, other = layer.encode_condition(y), lora("mul").encode_condition(y)
    assert pytree.tree_structure(later) == spec and pytree.tree_structure(other) != spec
    assert pytree.treespec_loads(pytree.treespec_dumps(spec)) == spec


def test_the_state_moves_and_copies():
    layer, (x, y) = lora(), inputs(grad=False)
    with torch.no_grad():
        state = layer.encode_condition(y)
        wanted = layer(x, y)
        rows = torch.tensor([1, 0, 1])
        torch.testing.assert_close(layer(x[rows], state.index_select(rows)), wanted[rows])
        wide = state.to(torch.float64)
        assert wide.tensor.dtype == torch.float64 and wide.versions == state.versions
        torch.testing.assert_close(layer(x, wide), wanted)
        copied = copy.deepcopy(state)
        assert copied.tensor.data_ptr() != state.tensor.data_ptr()
        torch.testing.assert_close(layer(x, copied), wanted)
        layer.lora_B.mul_(2)  # no part of the state
        torch.testing.assert_close(layer(x, state) - layer.base_layer(x), 2 * (wanted - layer.base_layer(x)))
        layer.condition_A.mul_(2)
    for old in (state, copied, wide, state.index_select(rows)):
        with pytest.raises(rp.StaleStateError):
            layer(x if old.tensor.shape[0] == B else x[rows], old)


@pytest.mark.parametrize("make", [lora, adapter])
@pytest.mark.parametrize("routing", [name for name in NAMES if name != "none"])
def test_gradients_flow_through_the_state(make, routing):
    layer, (x, y) = make(routing), inputs()
    wanted = results(lambda: layer(x, y), layer, x, y)
    assert_same(results(lambda: layer(x, layer.encode_condition(y)), layer, x, y), wanted)

    def twice():  # two uses of one state: its gradients add up
        state = layer.encode_condition(y)
        return layer(x, state) + layer(x, state.index_select(torch.arange(B)))

    assert_same(results(twice, layer, x, y), results(lambda: layer(x, y) * 2, layer, x, y))


def test_a_tensor_that_outlived_its_transform_keeps_its_gradient():
    A, B = torch.randn(4, 8, requires_grad=True), torch.randn(8, 4)
    x, y, kept = torch.randn(1, 5, 8), torch.randn(1, 3, 8), []

    def update(a):
        return functional.routed_lora(x, a, y, B, routing="mul", scaling=0.5).sum()

    def remembers(a):
        kept.append(a)
        return update(a)

    torch.func.grad(remembers)(A)
    update(A).backward()
    wanted, A.grad = A.grad, None
    update(kept[0]).backward()
    torch.testing.assert_close(A.grad, wanted)
