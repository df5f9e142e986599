"""How the operator sits in torch: dispatcher ops, lost gradients, transforms, tracing, export."""

import copy
import itertools

import pytest
import torch
from calls import CASES, assert_fake_is_real, backward_call, forward_call, infer_call
from layers import DC, NAMES, OUT, B, D, M, N, R, adapter, assert_same, inputs, linear_leaves, lora, results
from tiny_models import awaken
from torch import nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import routed_peft as rp
from routed_peft import functional
from routed_peft.routes import POOLS, ROUTES

OPS = torch.ops.routed_peft
NO_DERIVATIVE = "no derivative of its own"


# ------------------------------------------------------------------------------------------------ the five ops
ONES = 0b111111111


def backward_arguments(needs, save=2, **case):
    return backward_call(OPS, needs, save, **case)


@pytest.mark.parametrize("name", [name for i, name in enumerate(CASES) if i % 2 == 0])
def test_opcheck_forward_and_backward(name):
    case = CASES[name]
    torch.library.opcheck(OPS.forward.default, forward_call(2, **case))
    torch.library.opcheck(OPS.backward.default, backward_arguments(ONES, **case))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_fake_outputs_are_the_real_ones(case):
    for save in (0, 1, 2):
        assert_fake_is_real(OPS.forward.default, forward_call(save, **case))
    for needs in (ONES, 0, 0b000100110, 0b010101001):
        assert_fake_is_real(OPS.backward.default, backward_arguments(needs, **case))


def test_what_gram_saves_is_a_rule_of_shapes():
    """S is saved beside V where the forward goes through it. In whole numbers, so that no rounding can part the rule of
    the library from the tracer's; here on both sides of the threshold and upon it."""
    seen = set()
    for groups, width in ((1, R), (2, 2 * R)):
        slices = (0, 8, 16, 24) if groups == 2 else ()
        for n, m in itertools.product((1, 5, 11, 20, 40), (2, 4, 5, 11, 36)):
            case = dict(n=n, m=m, slices=slices, groups=groups, routing=("gram", "gram_relu")[m % 2])
            call = forward_call(2, **case)
            assert_fake_is_real(OPS.forward.default, call)
            state, kept = OPS.forward(*call)[2:]
            margin = B * R * (B * m + B * n + 32 * B) - 2 * B * m * (B * n + 8 * B)
            assert state.shape == ((B, width, R) if margin <= 0 else (0,)) and kept.shape == (B * m, width)
            assert OPS.forward(*call[:-1], 1)[2].shape == (B, width, R)  # nobody needs V
            seen.add((margin > 0) - (margin < 0))
    assert seen == {-1, 0, 1}


@pytest.mark.parametrize(
    "routing, pool, groups", [("gram", "none", 1), ("gram_relu", "none", 2), ("mul", "mean", 1), ("add", "none", 1)]
)
def test_opcheck_encode(routing, pool, groups):
    y, C, b_C = torch.randn(B, M, DC), torch.randn(R, DC), torch.randn(R) if groups == 2 else None
    mask = torch.tensor([[True, True, False], [True, False, False]])
    arguments = (y, C, b_C, mask, ROUTES[routing].code, POOLS[pool], 1, groups)
    for save in (False, True):
        torch.library.opcheck(OPS.encode.default, (*arguments, save))
    low = [a.bfloat16() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in arguments]
    assert_fake_is_real(OPS.encode.default, (*low, True))
    state, kept = OPS.encode(*arguments, True)
    for needs in (0b111, 0b010, 0):
        torch.library.opcheck(OPS.encode_backward.default, (needs, torch.randn_like(state), kept, *arguments))


SHORT = {name: case for name, case in CASES.items() if case.get("source") in ("none", "state")}


@pytest.mark.parametrize("case", SHORT.values(), ids=SHORT)
def test_infer_is_a_forward_that_keeps_nothing(case):
    for more in ({}, {"base": True}, {"residual": True, "base": False}, {"activation": "silu"}):
        if "residual" in more and "slices" in case:
            continue
        arguments, call = infer_call(**case | more)
        with torch.no_grad():
            assert torch.equal(OPS.infer(*arguments), OPS.forward(*call)[0])
            torch.library.opcheck(OPS.infer.default, arguments)
            assert_fake_is_real(OPS.infer.default, arguments)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.torch.jit.trace:DeprecationWarning")
def test_a_trace_runs_with_and_without_gradients():
    layer = awaken(rp.RoutedLoRA(nn.Linear(D, OUT), r=R, routing="gram"))  # by infer where nothing looks on
    x, y = torch.randn(B, N, D), torch.randn(B, M, D)
    with torch.no_grad():
        traced = torch.jit.trace(layer, (x, y), check_trace=False)
    assert "infer" not in str(traced.graph) and "routed_peft::forward" in str(traced.inlined_graph)
    new = torch.randn(B, N, D), torch.randn(B, M, D)
    torch.testing.assert_close(traced(*new), layer(*new))
    with torch.no_grad():
        torch.testing.assert_close(traced(*new), layer(*new))


# ------------------------------------------------------------------------------------------------ no gradient is lost
def calls_of_the_ops():
    """A call of each op whose tensors all require grad."""
    y, C = torch.randn(B, M, DC), torch.randn(R, DC)
    encode = (y, C, None, None, ROUTES["gram"].code, 0, 1, 1)
    state, kept = OPS.encode(*encode, True)
    return {
        "forward": forward_call(2, base=True),
        "infer": infer_call(source="state", base=True)[0],
        "backward": backward_arguments(ONES),
        "encode": (*encode, True),
        "encode_backward": (0b111, state, kept, *encode),
    }


@pytest.mark.filterwarnings("ignore:Error detected in Generated")  # the tracer's pointer to the failing line
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", ["forward", "infer", "backward", "encode", "encode_backward"])
def test_a_direct_call_has_no_gradient(name, compiled):
    def required(a):
        return a.requires_grad_() if isinstance(a, torch.Tensor) and a.is_floating_point() else a

    arguments = [required(a) for a in calls_of_the_ops()[name]]

    def call():
        result = getattr(OPS, name)(*arguments)
        return result if name == "infer" else result[0]

    with pytest.raises(Exception, match=NO_DERIVATIVE):  # under compile the tracer wraps it in an error of its own
        (torch.compile(call, backend="aot_eager") if compiled else call)().sum().backward()


def forms():
    """Each public function with tensors that require grad."""
    x, y = inputs()
    A, W, C = (torch.randn(*shape, requires_grad=True) for shape in ((R, D), (OUT, D), (R, DC)))
    up, wide, bias = (torch.randn(*shape, requires_grad=True) for shape in ((OUT, R), (D, R), (D,)))
    return {
        "lora": (lambda x, A, y, C: functional.routed_lora(x, A, y, up, C, routing="gram", scaling=1), (x, A, y, C)),
        "linear": (
            lambda x, A, y, C: functional.routed_linear(x, W, None, y, A, up, C, routing="mul", scaling=1), (x, A, y, C)
        ),
        "adapter": (
            lambda x, A, y, C: functional.routed_adapter(x, y, A, None, wide, bias, C, routing="expand"), (x, A, y, C)
        ),
        "encode": (lambda y, C: functional.encode_condition(y, C, routing="gram").tensor, (y, C)),
    }  # fmt: skip


FORMS = pytest.mark.parametrize("form", ["lora", "linear", "adapter", "encode"])


@FORMS
def test_second_derivatives_raise(form):
    call, leaves = forms()[form]
    plain = torch.autograd.grad(call(*leaves).square().sum(), leaves)
    first = torch.autograd.grad(call(*leaves).square().sum(), leaves, create_graph=True)
    assert_same([g.detach() for g in first], plain)
    for gradient in first:
        with pytest.raises(RuntimeError, match=NO_DERIVATIVE):
            torch.autograd.grad(gradient.sum(), leaves, retain_graph=True)
    compiled = torch.compile(call, backend="aot_eager")
    first = torch.autograd.grad(compiled(*leaves).square().sum(), leaves, create_graph=True)
    with pytest.raises(RuntimeError, match=f"{NO_DERIVATIVE}|does not currently support double backward"):
        first[0].sum().backward()


@FORMS
@pytest.mark.parametrize("grad", [False, True])
def test_forward_mode_raises(form, grad):
    """The bare op would drop the tangent and say nothing."""
    call, leaves = forms()[form]
    with torch.set_grad_enabled(grad), forward_ad.dual_level():
        dual = forward_ad.make_dual(leaves[-1].detach(), torch.ones_like(leaves[-1]))
        with pytest.raises(NotImplementedError, match="jvp"):
            call(*leaves[:-1], dual)
        call(*leaves)  # without a tangent there is nothing to refuse


# ------------------------------------------------------------------------------------------------ transforms
@FORMS
def test_func_grad(form):
    call, leaves = forms()[form]
    wanted = torch.autograd.grad(call(*leaves).square().sum(), leaves)
    values = [leaf.detach() for leaf in leaves]

    def loss(*values):
        return call(*values).square().sum()

    assert_same(torch.func.grad(loss, argnums=tuple(range(len(values))))(*values), wanted)
    with pytest.raises(RuntimeError, match=NO_DERIVATIVE):
        torch.func.grad(lambda *v: torch.func.grad(loss)(*v).sum())(*values)


@pytest.mark.parametrize("make", [lora, adapter])
def test_functional_call(make):
    layer, (x, y) = make(), inputs()
    other = copy.deepcopy(layer)
    nn.init.uniform_(other.lora_A if make is lora else other.down)
    loss = results(lambda: other(x, y), other)
    values = dict(other.named_parameters())
    assert_same(results(lambda: torch.func.functional_call(layer, values, (x, y)), other), loss)
    gradients = torch.func.grad(lambda v: torch.func.functional_call(layer, v, (x, y)).sum())(values)
    assert_same(list(gradients.values()), torch.autograd.grad(other(x, y).sum(), list(values.values())))


@FORMS
def test_vmap_is_right_or_raises(form):
    call, leaves = forms()[form]
    stacked = [torch.stack([leaf.detach(), leaf.detach() * 2, -leaf.detach()]) for leaf in leaves]
    with torch.no_grad():
        wanted = torch.stack([call(*each) for each in zip(*stacked, strict=True)])
        try:
            torch.testing.assert_close(torch.func.vmap(call)(*stacked), wanted)
        except RuntimeError as error:
            assert "vmap" in str(error)
    with pytest.raises(RuntimeError, match="vmap"):
        torch.func.vmap(torch.func.grad(lambda *v: call(*v).square().sum()))(*stacked)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("make, p", [(lora, {"lora_dropout": 0.4}), (adapter, {"dropout": 0.4})])
def test_checkpoint_with_dropout(make, p, reentrant):
    layer, (x, y) = make(**p), inputs()
    torch.manual_seed(5)
    wanted = results(lambda: layer(x, y), layer, x, y)
    torch.manual_seed(5)
    assert_same(results(lambda: checkpoint(layer, x, y, use_reentrant=reentrant), layer, x, y), wanted)


# ------------------------------------------------------------------------------------------------ torch.compile
@pytest.fixture
def compiled():
    """fullgraph, so that a graph break is an error; and the caches of other tests are out of the way."""
    torch.compiler.reset()
    yield lambda f, backend="aot_eager", **o: torch.compile(f, fullgraph=True, backend=backend, **o)
    torch.compiler.reset()


@pytest.mark.parametrize("make", [lora, adapter])
@pytest.mark.parametrize("routing", NAMES)
def test_compile(compiled, make, routing):
    layer, (x, y) = make(routing), inputs()
    backend = "inductor" if (make, routing) in ((lora, "gram"), (adapter, "expand")) else "aot_eager"
    fast = compiled(layer, backend)
    assert_same(results(lambda: fast(x, y), layer, x, y), results(lambda: layer(x, y), layer, x, y))
    mask = torch.tensor([[True, True, False], [True, False, False]])
    assert_same(results(lambda: fast(x, y, mask), layer, x), results(lambda: layer(x, y, mask), layer, x))
    if make is lora and routing != "none":
        layer = awaken(rp.RoutedLoRA(nn.Linear(D, OUT), r=R, routing=routing, condition_source="in_sequence"))
        mask = x[..., 0] > 0
        fast = compiled(lambda: layer(x, condition_mask=mask))
        assert_same(results(fast, layer, x), results(lambda: layer(x, condition_mask=mask), layer, x))


@pytest.mark.parametrize("make", [lora, adapter])
def test_compile_reads_the_delivered_condition(compiled, make):
    model = nn.Sequential(make("gram"), nn.Tanh())
    fast = compiled(model)
    x, first = inputs()
    for y, stance in ((first, "default"), (first.detach().mul(2).requires_grad_(), "fail_on_recompile")):
        with rp.condition(model, y):
            wanted = results(lambda: model(x), model, x, y)  # noqa: B023  run at once
            with torch.compiler.set_stance(stance):
                assert_same(results(lambda: fast(x), model, x, y), wanted)  # noqa: B023


@pytest.mark.parametrize("routing", ["gram", "mul"])
def test_compile_takes_a_state(compiled, routing):
    """Encoded outside or inside of the graph; and a state encoded after an optimiser step is no reason to recompile."""
    layer, (x, y) = lora(routing), inputs()

    def update(x, state):
        return functional.routed_lora(x, layer.lora_A, state, layer.lora_B, routing=routing, scaling=1)

    fast = compiled(update)
    for stance in ("default", "fail_on_recompile", "fail_on_recompile"):
        wanted = results(lambda: update(x, layer.encode_condition(y)), layer, x, y)
        with torch.compiler.set_stance(stance):
            assert_same(results(lambda: fast(x, layer.encode_condition(y)), layer, x, y), wanted)
        with torch.no_grad():
            layer.condition_A.mul_(0.5)
    wanted = results(lambda: layer(x, y), layer, x, y)
    whole = compiled(lambda: layer(x, layer.encode_condition(y)))
    assert_same(results(whole, layer, x, y), wanted)
    assert_same(results(lambda: compiled(layer)(x, layer.encode_condition(y)), layer, x, y), wanted)


@pytest.mark.parametrize("make, p", [(lora, {"lora_dropout": 0.2}), (lora, {}), (adapter, {})])
@pytest.mark.parametrize("mark", [False, True])
def test_compile_with_dynamic_sizes(compiled, make, p, mark):
    """New N and M need no new graph; M = 1 has one of its own, where the state is a vector, and so have sizes at which
    gram goes through S."""
    layer = make(**p)
    fast = compiled(layer, dynamic=None if mark else True)
    for n, m in ((5, 3), (6, 4), (9, 2), (6, 1), (40, 30), (30, 50)):
        x, y = inputs(n, m)
        if mark:
            torch._dynamo.maybe_mark_dynamic(x, 1)
            torch._dynamo.maybe_mark_dynamic(y, 1)
        torch.manual_seed(3)
        wanted = results(lambda: layer(x, y), layer, x, y)  # noqa: B023
        torch.manual_seed(3)
        with torch.compiler.set_stance("default" if m in (1, M, 30) else "fail_on_recompile"):
            assert_same(results(lambda: fast(x, y), layer, x, y), wanted)  # noqa: B023


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_dropout_under_compile(compiled, backend):
    layer = awaken(rp.RoutedAdapter(64, R, routing="mul", activation="none", residual=False, bias=False, dropout=0.5))
    x, y = torch.randn(B, N, 64, requires_grad=True), torch.randn(B, M, 64)
    fast = layer if backend == "eager" else compiled(layer, backend)

    def run(seed):
        if seed is not None:
            torch.manual_seed(seed)
        x.grad = None
        out = fast(x, y)
        out.sum().backward()
        # linear in x: only with the forward's mask does the gradient give the value back (Euler)
        torch.testing.assert_close((x.grad * x).sum(), out.sum())
        dropped = (x.grad == 0).float().mean()
        assert 0.35 < dropped < 0.65
        return out.detach(), x.grad

    first, second, again = run(1), run(None), run(1)
    assert_same(first, again, rtol=0, atol=0)
    assert not torch.equal(first[1] == 0, second[1] == 0)
    layer.eval()
    assert bool((torch.autograd.grad(fast(x, y).sum(), x)[0] != 0).all())


@pytest.mark.parametrize("seed", [3, -(2**62)])
def test_the_seed_fixes_dropout_in_every_mode(compiled, seed):
    x, A, up, y, C, *_ = linear_leaves(torch.float64)  # training may multiply in another order than inference
    options = {"routing": "gram", "scaling": 1.0, "dropout_p": 0.5, "seed": torch.tensor([seed])}
    wanted = functional.routed_lora(x, A, y, up, C, **options)
    trained = functional.routed_lora(x, A.requires_grad_(), y, up, C, **options)
    assert_same([trained, compiled(functional.routed_lora)(x, A, y, up, C, **options)], [wanted, wanted])
    assert not torch.allclose(wanted, functional.routed_lora(x, A, y, up, C, **{**options, "dropout_p": 0.0}))


# ------------------------------------------------------------------------------------------------ torch.export
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = lora()

    def forward(self, x, condition):
        return self.layer(x, condition).tanh()


def test_export_honours_a_new_condition():
    model, (x, y) = Model(), inputs(grad=False)
    tokens = {"x": {1: torch.export.Dim("N", min=2)}, "condition": {1: torch.export.Dim("M", min=2)}}
    for shapes, sizes in ((None, [(N, M)]), (tokens, [(9, 7), (3, 3), (60, 50)])):
        program = torch.export.export(model, (x, y), dynamic_shapes=shapes, strict=shapes is None).module()
        for n, m in sizes:
            new = inputs(n, m, grad=False)
            torch.testing.assert_close(program(*new), model(*new))


def test_export_takes_a_state():
    """Also one from parameters that have changed since: the identity of parameters is no part of the signature."""
    model, (x, y) = Model(), inputs(grad=False)
    program = torch.export.export(model, (x, model.layer.encode_condition(y))).module()
    with torch.no_grad():
        model.layer.condition_A.mul_(2)
    state = model.layer.encode_condition(torch.randn(B, M, DC))
    torch.testing.assert_close(program(x, state), model(x, state))
