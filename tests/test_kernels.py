"""The CUDA kernels, emulated or on a GPU: masks, memory, launches, order of execution, and how they sit in torch."""

import dataclasses
import itertools
from types import SimpleNamespace

import emulated
import pytest
import torch
from calls import CASES, TENSORS, assert_fake_is_real, backward_call, forward_call, infer_call
from cases import EVERY, ROUTED, Backend, Case, worst
from layers import N
from torch.utils.checkpoint import checkpoint

import routed_peft as rp
from routed_peft import functional, ops
from routed_peft.ops import KERNEL_DTYPES
from routed_peft.reference import dropout_multiplier


# ------------------------------------------------------------------------------------------------ one call, all of it
def everything(case, backend, prepare=lambda t: t, autocast=False, seed=5, dout=lambda t: t):
    """The output and every gradient, on the CPU, by name. ``prepare`` changes the tensors, ``dout`` the output's
    gradient."""
    t, constant = (backend.take(each) for each in case.tensors())
    t = {k: v.requires_grad_() for k, v in prepare(t).items()}
    out = case._call(t, constant, backend, torch.tensor([seed], device=backend.device))
    weights = torch.linspace(-1, 1, out.numel(), device=out.device).div(64).reshape(out.shape).to(out.dtype)
    with torch.autocast(out.device.type, dtype=torch.bfloat16, enabled=autocast):
        out.backward(dout(weights))
    gradients = {k: v.grad.cpu() for k, v in t.items() if v.grad is not None}
    return {"out": out.detach().cpu(), **gradients}


def assert_same_bits(got, want, where=""):
    assert got.keys() == want.keys()
    for name in want:
        assert torch.equal(got[name], want[name]), f"{name} {where}"


# ------------------------------------------------------------------------------------------------ dropout
def multiplier(seed, rows, cols, p, stream):
    return dropout_multiplier(torch.tensor(seed), rows, cols, p, stream)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("rows, d", [(3, 200), (70, 256), (130, 77)])
def test_dropout_of_the_input_is_the_map(native, rows, d, dtype):
    """x of ones through A = B = 1 shows the mask itself, with the factor that belongs to it."""
    for p, seed in ((0.5, 7), (0.3, -(2**62))):
        one = torch.eye(d, dtype=dtype, device=native.device)
        got = functional.routed_lora(
            torch.ones(rows, d, dtype=dtype, device=native.device), one, None, one, routing="none", scaling=1.0,
            dropout_p=p, seed=torch.tensor([seed], device=native.device), backend=native,
        )  # fmt: skip
        want = multiplier(seed, rows, d, p, 0)
        assert torch.equal(got.cpu() != 0, want != 0)
        assert torch.equal(got.cpu(), want.to(dtype))


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("m", [1, 5])
def test_dropout_of_the_condition_is_the_map(native, m, dtype):
    """Z = 0 + V, pooled (m = 1) or paired with the input's tokens."""
    d, seed = 150, 11
    one = torch.eye(d, dtype=dtype, device=native.device)
    y = torch.ones(40 // m, m, d, dtype=dtype, device=native.device)
    got = functional.routed_lora(
        torch.zeros_like(y), one, y, one, one, routing="add", pool="none", scaling=1.0, dropout_p=0.0,
        condition_dropout_p=0.4, seed=torch.tensor([seed], device=native.device), backend=native,
    )  # fmt: skip
    assert torch.equal(got.cpu().reshape(40, d), multiplier(seed, 40, d, 0.4, 1).to(dtype))


def dropped(case, name, stream, p):
    """Where the map drops one of ``case``'s tensors for seed 5."""
    shape = case.tensors()[0][name].shape
    return (multiplier(5, shape[:-1].numel(), shape[-1], p, stream) == 0).reshape(shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("p", [0.1, 0.5])
@pytest.mark.parametrize("routing", EVERY)
def test_gradients_are_zero_where_inputs_were_dropped_and_only_there(routing, p, dtype, native):
    """The update's part of dX and dY; the masks are the forward's, which the tests above know."""
    sizes = dict(n=33, m=7, d=70, d_c=66, r=24, out=40, dropout=p, dtype=dtype)
    for options in ({}, {"varlen": True, "batch": 3}, {"in_sequence": True, "d_c": None}, {"pool": "none", "m": 33}):
        if routing == "none" and options.get("in_sequence"):
            continue
        case = Case(routing, "lora", **{**sizes, **options})
        got, first = everything(case, native), int(case.in_sequence)  # whose first sample has no condition token
        assert torch.equal(got["x"][first:] == 0, dropped(case, "x", 0, p)[first:]), f"dX of {case}"
        if "y" in got:
            assert torch.equal(got["y"] == 0, dropped(case, "y", 1, p)), f"dY of {case}"
    base = Case(routing, "linear", **sizes)
    assert everything(base, native)["x"].all(), "the base layer's part is not dropped"


# ------------------------------------------------------------------------------------------------ memory
def options_of_every_route():
    for routing in EVERY:
        yield Case(routing, n=9, m=6, d=40, r=20, out=30, d_c=24)
        if routing != "none":
            yield Case(routing, "lora", in_sequence=True, n=9, d=40, r=20, slices=True)
            yield Case(routing, "base", varlen=True, batch=3, d=40, r=20, slices=True, across=True)
            yield Case(routing, "adapter", masked=True, index=(1, 0, 1), batch=3, d=40, r=20, pool="mean")


OF_EVERY_ROUTE = list(options_of_every_route())
SOME = OF_EVERY_ROUTE[::3]


@pytest.fixture
def poison():
    """Fresh memory holds NaN (what torch calls filling of uninitialised memory)."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("case", OF_EVERY_ROUTE, ids=str)
def test_everything_is_written_and_nothing_else_read(case, native, poison):
    assert torch.empty(3).isnan().all()
    for dtype in (torch.float32, torch.bfloat16):
        case = dataclasses.replace(case, dtype=dtype)
        got = everything(case, native)
        assert all(tensor.isfinite().all() for tensor in got.values())
        torch.use_deterministic_algorithms(False)
        assert_same_bits(got, everything(case, native))
        torch.use_deterministic_algorithms(True, warn_only=True)


def shifted(t, by=1):
    """The same values, contiguous, ``by`` elements into a larger storage: no longer aligned to 16 bytes."""
    room = t.new_full([t.numel() + by], float("nan"))
    room[by:] = t.flatten()
    return room[by:].view(t.shape)


def turned(t):
    """The same values, the last dimension the slow one."""
    return t.movedim(-1, 0).contiguous().movedim(0, -1)


def spread(t):
    """The same values, every second of a wider tensor."""
    room = t.new_full([*t.shape[:-1], 2 * t.shape[-1]], float("nan"))
    room[..., ::2] = t
    return room[..., ::2]


@pytest.mark.parametrize("move", [shifted, turned, spread])
@pytest.mark.parametrize("case", SOME, ids=str)
def test_strided_and_shifted_inputs(case, native, move):
    for dtype in (torch.float32, torch.bfloat16):
        case = dataclasses.replace(case, dtype=dtype)
        got = everything(case, native, lambda t: {k: move(v) for k, v in t.items()}, dout=move)
        want = everything(case, native)
        limit = native.close if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
        for name in want:
            assert worst(got[name], want[name]) < limit, name


@pytest.mark.parametrize("routing", ROUTED)
@pytest.mark.parametrize("pool", ["none", "mean"])
def test_an_index_out_of_range_is_neither_read_nor_silent(routing, pool, kernels):
    """The ops do not look at an index on a GPU; the rows that it leads astray hold NaN, and only they."""
    case = Case(routing, "lora", batch=3, n=5, m=5, pool=pool, dtype=torch.bfloat16)
    t, _ = (kernels.take(each) for each in case.tensors())
    index = torch.tensor([0, 2, 1], device=kernels.device)
    called, kernels_ops = [], ops.BACKENDS[kernels].ops

    def recorded(name, at):
        def op(*arguments):
            called.append((name, at, [*arguments]))
            return getattr(kernels_ops, name)(*arguments)

        return op

    noted = SimpleNamespace(forward=recorded("forward", 10), infer=recorded("infer", 7))
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setitem(ops.BACKENDS, str(kernels), dataclasses.replace(ops.BACKENDS[kernels], ops=noted))
        want = case.run(t, {"index": index}, kernels)
    ((name, at, arguments),) = called
    for wrong in (3, -1, 2**40, -(2**62)):
        arguments[at] = torch.tensor([0, wrong, 1], device=kernels.device)
        with torch.no_grad():
            got = getattr(kernels_ops, name)(*arguments)
        got = (got if name == "infer" else got[0]).cpu()
        assert torch.equal(got[[0, 2]], want[[0, 2]])
        assert got[1].isnan().all()


@pytest.mark.parametrize("cols", [128, 72])
def test_every_row_is_added_to_its_own_row_of_the_base(cols, kernels):
    for dtype in (torch.float32, torch.bfloat16):
        x, y, base = (torch.randn(2, n, d, dtype=dtype) for n, d in ((70, 64), (5, 64), (70, cols)))
        A, B = torch.randn(8, 64, dtype=dtype), torch.randn(cols, 8, dtype=dtype)
        given = dict(routing="mul", scaling=0.1, activation="gelu")
        with torch.no_grad():
            want = functional.apply("layer", x, A, y, B, None, base=base, backend="cpu", **given)
            there = [t.to(kernels.device) for t in (x, A, y, B)]
            got = functional.apply("layer", *there, None, base=base.to(kernels.device), backend=kernels, **given)
        assert worst(got.cpu().double(), want.double()) < (1e-5 if dtype == torch.float32 else 2**-7)


# ------------------------------------------------------------------------------------------------ what a forward saves
@pytest.mark.parametrize("name", CASES)
def test_saved_tensors_are_the_cpu_ops(name, kernels):
    for dtype in (torch.float32, torch.bfloat16):
        for save in (0, 1, 2):
            call = forward_call(save, **{**CASES[name], "dtype": dtype}, base=name == "none")
            there = [a.to(kernels.device) if isinstance(a, torch.Tensor) else a for a in call]
            got = ops.BACKENDS[kernels].ops.forward(*there)
            for what, a, b in zip(
                ("out", "T", "state", "kept"), got, torch.ops.routed_peft.forward(*call), strict=True
            ):
                assert (a.shape, a.dtype) == (b.shape, b.dtype), what
                limit = 1e-4 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
                assert worst(a.cpu().double(), b.double()) < limit, f"{what}, save={save}, {dtype}"


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.get("source") in ("none", "state")])
def test_infer_is_a_forward_that_keeps_nothing(name, kernels):
    short, call = (
        [a.to(kernels.device) if isinstance(a, torch.Tensor) else a for a in arguments]
        for arguments in infer_call(**CASES[name])
    )
    calls = ops.BACKENDS[kernels].ops
    with torch.no_grad():
        assert torch.equal(calls.infer(*short), calls.forward(*call)[0])


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_fakes_know_the_kernels_outputs(case):
    Backend("emulated").ready()
    if case.get("dtype") != torch.float64:
        emulated_ops = torch.ops.routed_peft_emulated
        for save in (0, 1, 2):
            assert_fake_is_real(emulated_ops.forward.default, forward_call(save, **case))
        for needs in (0b111111111, 0b010101001):
            assert_fake_is_real(emulated_ops.backward.default, backward_call(emulated_ops, needs, **case))


# ------------------------------------------------------------------------------------------------ launches
LAUNCHES = {
    "none": (Case("none"), "down_route up_project"),
    "none, few tokens": (Case("none", d=4096), "down_route route up_project"),
    "gram, through S": (Case("gram", n=64, m=64, r=8), "down_route gram down_route up_project"),
    "gram, a long condition": (
        Case("gram", n=640, m=1000, r=16, d=256), "down_route route gram gram_reduce down_route route up_project"
    ),
    "gram, through tokens": (Case("gram", n=8, m=4, r=64), "down_route down_route up_project"),
    "gram_relu": (Case("gram_relu", n=64, m=64, r=8), "down_route gram down_route up_project"),
    "gram of a state": (Case("gram", "state", n=64, m=64, r=8), "down_route gram down_route up_project"),
    "rank one": (Case("gram", pool="mean"), "pool project directions rank_one"),
    "a few rows of a bank": (
        Case("gram", pool="mean", n=1, index=(0, 9)), "pool project down_route up_project"
    ),
    "expand": (Case("expand"), "pool project directions rank_one"),
    "ones": (Case("ones"), "pool project directions rank_one"),
    "add": (Case("add"), "pool project down_route up_project"),
    "mul": (Case("mul"), "pool project down_route up_project"),
    "mul, token by token": (Case("mul", pool="none", m=5), "down_route down_route up_project"),
    "in sequence": (Case("gram", "lora", in_sequence=True), "down_route gram route up_project"),
    "in sequence, pooled": (Case("mul", "lora", in_sequence=True), "pool project down_route up_project"),
    "cross_gram": (Case("cross_gram"), "pool project down_route pool route up_project"),
    "cross_gram, token by token": (Case("cross_gram", pool="none", m=5), "down_route down_route gram route up_project"),
    "float32 parameters": (
        Case("gram", n=64, m=64, r=8, d_c=6, parameter_dtype=torch.float32),
        "pack down_route gram down_route up_project",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LAUNCHES)
def test_launches(name):
    Backend("emulated").ready()
    case, kernels = LAUNCHES[name]
    case = dataclasses.replace(case, dtype=torch.bfloat16)
    t, constant = case.tensors()
    emulated.launches()
    with torch.no_grad():
        case.run(t, constant, "emulated")
    assert emulated.launches() == kernels.split()


def gradients_launch(case, wanted):
    """The kernels of the backward that computes the gradients named in ``wanted``."""
    case = dataclasses.replace(case, dtype=torch.bfloat16)
    t, constant = case.tensors()
    t = {k: v.requires_grad_(k in wanted) for k, v in t.items()}
    out = case.run(t, constant, "emulated")
    emulated.launches()
    out.sum().backward()
    return emulated.launches()


# Of every gradient that the update has; a base layer's are apart, below.
UPDATES = ("x", "A", "B", "y", "C", "b_down", "b_up", "b_C")
BACKWARD_LAUNCHES = {
    "none": (Case("none", r=8), "grad_output grad_input reduce"),
    "gram, through S": (Case("gram", n=64, m=64, r=8, d_c=6), "grad_output gram gram_matrix grad_input reduce"),
    "gram, through tokens": (Case("gram", n=8, m=4, r=64, d_c=6), "grad_output gram_tokens grad_input reduce"),
    "gram, one projection": (Case("gram", n=64, m=64, r=8), "grad_output gram gram_matrix grad_input reduce"),
    "gram_relu": (Case("gram_relu", n=64, m=64, r=8, d_c=6), "grad_output gram gram_matrix grad_input reduce"),
    "gram of a state": (
        Case("gram", "state", n=64, m=64, r=8, d_c=6),
        "grad_output gram gram_state grad_input reduce gram_matrix grad_input reduce",  # the state's own from the sixth
    ),
    "rank one": (Case("gram", pool="mean", d_c=6), "directions rank_one_sweep rank_one_sum rank_one_weights"),
    "rank one, one projection": (Case("gram", pool="mean"), "directions rank_one_sweep rank_one_sum rank_one_weights"),
    "rank one, float32 parameters": (
        Case("gram", m=1, slices=True, d_c=6, parameter_dtype=torch.float32),
        "directions rank_one_sweep rank_one_sum rank_one_weights",
    ),
    "expand": (Case("expand", d_c=6), "directions rank_one_sweep rank_one_sum rank_one_weights"),
    "ones": (Case("ones", d_c=6), "directions rank_one_sweep rank_one_sum rank_one_weights"),
    "add": (Case("add", d_c=6, r=8), "grad_output state_vectors pooled_grad grad_input reduce"),
    "mul": (Case("mul", d_c=6, r=8), "grad_output state_vectors pooled_grad grad_input reduce"),
    "mul, token by token": (Case("mul", pool="none", m=5, d_c=6, r=8), "grad_output state_tokens grad_input reduce"),
    "adapter": (Case("mul", "adapter", d_c=6, r=8), "grad_output state_vectors pooled_grad grad_input reduce"),
    "in sequence": (Case("gram", "lora", in_sequence=True, r=8), "grad_output gram gram_matrix grad_input reduce"),
    "in sequence, pooled": (Case("mul", "lora", in_sequence=True, r=8), "grad_output state_vectors grad_input reduce"),
    "cross_gram": (
        Case("cross_gram", d_c=6, r=8),
        "pool grad_output state_vectors route_grad pooled_grad grad_input reduce",
    ),
    "cross_gram, token by token": (
        Case("cross_gram", pool="none", m=5, d_c=6, r=8),
        "gram grad_output gram route_grad state_tokens grad_input reduce",
    ),
    "wide": (Case("mul", r=200, d_c=6), "grad_output route_grad state_vectors pooled_grad grad_input reduce"),
    "rows of B that are not aligned": (
        Case("mul", r=3, d_c=6),
        "pack grad_output state_vectors pooled_grad grad_input reduce",
    ),
    "float32 parameters": (
        Case("gram", n=64, m=64, r=8, d_c=6, parameter_dtype=torch.float32),
        "pack grad_output gram gram_matrix grad_input reduce",
    ),
    "float32 parameters, adapter": (
        Case("mul", "adapter", r=200, d_c=6, parameter_dtype=torch.float32),
        "pack grad_output route_grad state_vectors pooled_grad grad_input reduce",
    ),
    "float32 parameters, cross_gram": (
        Case("cross_gram", r=200, d_c=6, parameter_dtype=torch.float32),
        "pack pool grad_output route_grad state_vectors route_grad pooled_grad grad_input reduce",
    ),
}


@pytest.mark.parametrize("name", BACKWARD_LAUNCHES)
def test_launches_of_the_backward(name):
    Backend("emulated").ready()
    case, kernels = BACKWARD_LAUNCHES[name]
    found = gradients_launch(case, UPDATES)
    assert found == kernels.split()
    of_state = found[5:] if case.form == "state" else []
    limit = 4 if found[0] == "directions" else 9 if case.routing == "cross_gram" or case.in_sequence else 7
    assert len(found) - len(of_state) <= limit and len(of_state) <= limit


# What is wanted, and the kernels that are left of mul's and of gram's.
PARTS = {
    "B alone": ("B", "route_grad grad_input reduce", "route_grad grad_input reduce"),
    "biases alone": ("bias", "grad_input reduce", "grad_input reduce"),
    "the weight of the base alone": ("W", "", ""),
    "x alone": ("x", "grad_output grad_input", "grad_output grad_input"),
    "a frozen condition": ("x A B", "grad_output grad_input reduce", "grad_output grad_input reduce"),
    "the condition alone": (
        "y C", "grad_output state_vectors pooled_grad reduce", "grad_output gram gram_matrix grad_input reduce"
    ),
    "the parameters": (
        "A B C W bias", "grad_output state_vectors pooled_grad grad_input reduce",
        "grad_output gram gram_matrix grad_input reduce",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("routing", ["mul", "gram"])
def test_what_nobody_wants_is_not_launched(name, routing):
    Backend("emulated").ready()
    wanted, of_mul, of_gram = PARTS[name]
    found = gradients_launch(Case(routing, n=40, m=30, r=8, d_c=6), wanted.split())
    assert found == (of_mul if routing == "mul" else of_gram).split()


# ------------------------------------------------------------------------------------------------ some gradients
SUBSETS = [
    Case("none", "adapter"),
    Case("gram", n=40, m=30, d_c=5),
    Case("gram", n=8, m=4, r=24, d_c=5),
    Case("gram_relu", "adapter", n=20, m=9, d_c=5),
    Case("mul", "adapter", d_c=5, masked=True),
    Case("mul", pool="none", m=5, slices=True),
    Case("cross_gram", "adapter", d_c=5),
    Case("cross_gram", pool="none", m=5),
    Case("expand", d_c=5),
    Case("gram", "lora", pool="mean", slices=True),
    Case("gram", "lora", in_sequence=True, n=12),
    Case("add", "lora", in_sequence=True, pool="mean"),
    Case("gram", "base", d_c=5, m=1),
    Case("add", "state", d_c=5),
]


@pytest.mark.parametrize("case", SUBSETS, ids=str)
def test_every_subset_of_gradients(case, kernels):
    """Each is the one of the full backward, and nothing else is computed: the op is asked for just these, and answers
    with nothing for the others."""
    case = dataclasses.replace(case, dtype=torch.float32, dropout=0.2)
    want = everything(case, kernels)
    names = list(case.tensors()[0])
    subsets = list(itertools.product((False, True), repeat=len(names)))[1:]
    step = max(len(subsets) // 24, 1)
    asked = Asked(ops.BACKENDS[kernels].ops)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ops.BACKENDS, str(kernels), dataclasses.replace(ops.BACKENDS[kernels], ops=asked))
        for chosen in [s for i, s in enumerate(subsets) if i % step == 0 or sum(s) == 1]:
            t, constant = (kernels.take(each) for each in case.tensors())
            t = {k: v.requires_grad_(some) for (k, v), some in zip(t.items(), chosen, strict=True)}
            out = case._call(t, constant, kernels, torch.tensor([5], device=kernels.device))
            weights = torch.linspace(-1, 1, out.numel(), device=out.device).div(64).reshape(out.shape).to(out.dtype)
            asked.answers.clear()
            out.backward(weights)
            for name, tensor in t.items():
                assert (tensor.grad is not None) == (tensor.requires_grad and name in want), f"{name} of {chosen}"
                if tensor.grad is not None:
                    assert worst(tensor.grad.cpu(), want[name]) < kernels.close, f"{name} of {chosen}"
            assert len(asked.answers) <= 1 + (case.form == "state")
            for needs, answers in asked.answers:
                assert all((answer.numel() > 0) == bool(needs >> i & 1) for i, answer in enumerate(answers))
            wanted = {k for k, v in t.items() if v.requires_grad} - {"base"}
            assert sum(needs.bit_count() for needs, _ in asked.answers) == len(wanted) + (
                case.form == "state" and bool(wanted & {"y", "C"})  # the state's gradient
            )


class Asked:
    """The ops, and which gradients the backward ones were asked for."""

    def __init__(self, real):
        self.real, self.answers = real, []

    def __getattr__(self, name):
        op = getattr(self.real, name)

        def recorded(needs, *arguments):
            self.answers.append((needs, op(needs, *arguments)))
            return self.answers[-1][1]

        return recorded if name.endswith("backward") else op


# ------------------------------------------------------------------------------------------------ order of execution
@pytest.mark.parametrize("case", SOME, ids=str)
def test_any_order_of_execution_gives_the_same_bits(case):
    """Blocks, warps and lanes in three orders, copies as early and as late as they may come; all gradients too."""
    backend = Backend("emulated").ready()
    for dtype in (torch.bfloat16, torch.float32):
        case = dataclasses.replace(case, dtype=dtype, n=70, m=70 if case.pool == "none" else 66, dropout=0.3)
        found = []
        for mode in emulated.MODES:
            with emulated.options(mode):
                found.append(everything(case, backend))
        assert all(tensor.isfinite().all() for tensor in found[0].values())
        for mode, other in zip(emulated.MODES, found, strict=True):
            assert_same_bits(other, found[0], mode)


@pytest.mark.parametrize("case", OF_EVERY_ROUTE, ids=str)
def test_the_same_bits_every_time(case, kernels):
    case = dataclasses.replace(case, dtype=torch.bfloat16, n=70, m=70 if case.pool == "none" else 66, dropout=0.3)
    assert_same_bits(everything(case, kernels), everything(case, kernels))


# ------------------------------------------------------------------------------------------------ in torch
def layer_and_inputs(kernels, **options):
    layer = rp.RoutedLoRA.from_features(16, 24, r=4, condition_features=12, backend=str(kernels), **options)
    torch.nn.init.normal_(layer.lora_B)
    x, y = torch.randn(2, 5, 16, device=kernels.device), torch.randn(2, 3, 12, device=kernels.device)
    return layer.to(kernels.device), x.requires_grad_(), y.requires_grad_()


def gradients(call, layer, *inputs):
    return torch.autograd.grad(call().square().sum(), [*layer.parameters(), *inputs])


@pytest.mark.parametrize("encoded", [False, True])
@pytest.mark.parametrize("routing", ["gram", "mul"])
def test_compiled_training(routing, encoded, kernels):
    layer, x, y = layer_and_inputs(kernels, routing=routing)

    def call():
        return layer(x, layer.encode_condition(y) if encoded else y)

    want = gradients(call, layer, x, y)
    torch._dynamo.reset()
    got = gradients(torch.compile(call, fullgraph=True, backend="aot_eager"), layer, x, y)
    torch.testing.assert_close(got, want)


def test_transforms(kernels):
    layer, x, y = layer_and_inputs(kernels, lora_dropout=0.4)
    x, y = x.detach(), y.detach()
    values = dict(layer.named_parameters())

    def loss(values):
        torch.manual_seed(3)
        return torch.func.functional_call(layer, values, (x, y)).square().sum()

    want = torch.autograd.grad(loss(values), list(values.values()))
    torch.testing.assert_close(list(torch.func.grad(loss)(values).values()), list(want))
    first = torch.autograd.grad(loss(values), list(values.values()), create_graph=True)
    with pytest.raises(RuntimeError, match="no derivative of its own"):
        first[-1].sum().backward()


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("routing", ["gram", "mul", "expand", "cross_gram"])
def test_a_checkpoint_draws_the_same_masks_again(routing, reentrant, native):
    layer, x, y = layer_and_inputs(native, routing=routing, lora_dropout=0.4)

    def run(call):
        torch.manual_seed(3)
        for leaf in (x, y, *layer.parameters()):
            leaf.grad = None
        out = call(x, y)
        out.square().sum().backward()
        return [out.detach(), *(leaf.grad for leaf in (x, y, *layer.parameters()))]

    want = run(layer)
    got = run(lambda x, y: checkpoint(layer, x, y, use_reentrant=reentrant))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_half_precision_training_keeps_float32_gradients(kernels):
    case = Case("gram", "linear", n=24, d=64, out=48, r=8, dtype=torch.bfloat16, parameter_dtype=torch.float32)
    got, want = case.gradients(kernels), case.gradients("reference", dtype=torch.float64)
    for name, tensor in got.items():
        assert tensor.dtype == (torch.bfloat16 if name in ("out", "x", "y", "W") else torch.float32)
        assert (tensor.double() - want[name]).norm() < 0.02 * want[name].norm(), name


@pytest.mark.parametrize("routing, pool", [("mul", "mean"), ("gram", "none"), ("gram", "mean")])
def test_float64_parameters_under_a_narrower_input(routing, pool, kernels):
    case = Case(routing, "lora", pool=pool, d_c=24, dtype=torch.float32, parameter_dtype=torch.float64)
    got, want = case.gradients(kernels), case.gradients("reference", dtype=torch.float64)
    for name in ("A", "B", "C"):
        assert got[name].dtype == torch.float64
        assert worst(got[name], want[name]) < 1e-5, name


# ------------------------------------------------------------------------------------------------ on a GPU alone
@pytest.fixture
def gpu():
    return Backend("cuda").ready()


ROUTES_ON_A_GPU = [Case(routing, d=64, r=16, out=64, batch=4, n=70, m=9, dtype=torch.bfloat16) for routing in EVERY]


def on_gpu(case):
    t, constant = (Backend("cuda").take(each) for each in case.tensors())
    seed = torch.tensor([5], device="cuda")
    return lambda: case._call(t, constant, "cuda", seed), t


def step_on_gpu(case):
    """Output and gradients of one call, and its tensors."""
    call, t = on_gpu(case)
    leaves = [tensor.requires_grad_() for tensor in t.values()]
    weights = torch.randn_like(call())

    def step():
        out = call()
        return out.detach(), *torch.autograd.grad(out, leaves, weights)

    return step, t


def captured(step):
    """The graph of ``step``, and the tensors that its replays fill."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    return graph, found


@pytest.mark.cuda
@pytest.mark.parametrize("case", ROUTES_ON_A_GPU, ids=str)
def test_nothing_waits_for_the_gpu(case, gpu):
    step, _ = step_on_gpu(dataclasses.replace(case, dropout=0.2))
    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("case", ROUTES_ON_A_GPU, ids=str)
def test_gradients_have_the_same_bits_on_any_stream_and_in_a_graph(case, dtype, gpu):
    """Without a base layer, whose products are the library's. Twenty runs, some beside other work."""
    step, _ = step_on_gpu(dataclasses.replace(case, form="lora", dropout=0.2, dtype=dtype))
    want = step()
    streams, busy = [torch.cuda.Stream() for _ in range(3)], torch.randn(2048, 2048, device="cuda")
    runs = [step() for _ in range(8)]
    torch.cuda.synchronize()
    for i in range(12):
        with torch.cuda.stream(streams[i % 2]):
            runs.append(step())
        with torch.cuda.stream(streams[2]):
            busy @ busy
    torch.cuda.synchronize()
    graph, found = captured(step)
    for _ in range(2):
        for tensor in found:
            tensor.fill_(float("nan"))
        graph.replay()
        runs.append([tensor.clone() for tensor in found])
    for run in runs:
        assert all(torch.equal(a, b) for a, b in zip(run, want, strict=True))


@pytest.mark.cuda
@pytest.mark.parametrize("case", ROUTES_ON_A_GPU, ids=str)
def test_a_graph_of_a_backward_replays_new_inputs(case, gpu):
    step, t = step_on_gpu(dataclasses.replace(case, form="lora"))
    graph, found = captured(step)
    with torch.no_grad():
        t["x"].copy_(torch.randn_like(t["x"]))
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(found, step(), strict=True))


@pytest.mark.cuda
@pytest.mark.parametrize("case", ROUTES_ON_A_GPU, ids=str)
def test_a_graph_replays_new_inputs(case, gpu):
    call, t = on_gpu(case)
    with torch.no_grad():
        graph, out = captured(call)
        t["x"].copy_(torch.randn_like(t["x"]))
        graph.replay()
        assert torch.equal(out, call())


@pytest.mark.cuda
def test_the_current_stream_is_used(gpu):
    call, t = on_gpu(ROUTES_ON_A_GPU[EVERY.index("gram")])
    with torch.no_grad():
        want = call()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            torch.cuda._sleep(100_000_000)
            t["x"].mul_(2)  # behind the sleep: another stream would read x too early
            got = call()
        torch.cuda.synchronize()
        assert not torch.equal(got, want)
        assert torch.equal(got, call())


# ------------------------------------------------------------------------------------------------ the backward
@pytest.mark.parametrize("routing", ["gram", "mul"])
def test_a_backward_inside_autocast_keeps_float32(routing, native):
    case = Case(routing, "lora", n=24, d=64, out=48, r=16, dtype=torch.float32)
    inside, outside = everything(case, native, autocast=True), everything(case, native)
    assert all(torch.equal(inside[name], outside[name]) for name in outside)


def test_a_float16_backward_is_finite_where_the_forward_is(native):
    """Unscaled gram with Z beyond float16: nothing of the gradients is."""
    case = Case("gram", "lora", n=8, m=400, d=64, out=32, r=8, scale="none", dtype=torch.float16)

    def large(t):
        t["x"].mul_(64)
        t["y"].mul_(3)
        t["B"].mul_(2.0**-12)
        return t

    got, want = everything(case, native, large), everything(
        dataclasses.replace(case, dtype=torch.float64), Backend("reference"), large
    )  # fmt: skip
    b = large(case.tensors()[0])["B"].abs().max()
    assert want["out"].abs().max() / (case.r * b) > 65504, "the largest of Z is at least that"
    for name in ("out", "B"):
        assert got[name].isfinite().all()
        assert (got[name].double() - want[name]).norm() < 1e-2 * want[name].norm(), name


@pytest.mark.parametrize("p", [0.4, 1.0])
def test_dropped_elements_may_be_nan_in_both_directions(p, native):
    case = Case("gram", "lora", n=6, m=4, d=70, dropout=p, dtype=torch.float32)
    for name, stream in (("x", 0), ("y", 1)):

        def poison(t, name=name, stream=stream):
            rows = t[name].flatten(0, -2)
            kept = dropout_multiplier(torch.tensor(5), *rows.shape, p, stream).to(rows.device) != 0
            t[name] = rows.masked_fill(~kept, float("nan")).reshape(t[name].shape)
            return t

        got, want = everything(case, native, poison), everything(case, native)
        assert all(got[k].isfinite().all() and worst(got[k], want[k]) < 1e-6 for k in want)


@pytest.mark.parametrize(
    "routing, pool", [("gram", "none"), ("gram", "mean"), ("mul", "mean"), ("mul", "none"), ("cross_gram", "mean"),
                      ("cross_gram", "none"), ("add", "none"), ("gram_relu", "none")]
)  # fmt: skip
def test_an_index_out_of_range_leaves_a_backward_to_finish(routing, pool, kernels):
    """Its rows are NaN, and so may be whatever they take part in; the other rows of dX are what they were."""
    case = {"routing": routing, "pool": pool, "m": N, "samples": 3}
    call = [a.to(kernels.device) if isinstance(a, torch.Tensor) else a for a in forward_call(2, **case)]
    native = ops.BACKENDS[kernels].ops
    found = []
    for second in (2, 3, -1, 2**40, -(2**62)):
        call[10] = torch.tensor([0, second, 1], device=kernels.device)
        out, t, state, kept = native.forward(*call)
        dout = torch.linspace(-1, 1, out.numel(), device=out.device).reshape(out.shape)
        gradients = native.backward(0b111111, dout, t, state, kept, *call[:TENSORS], *call[TENSORS + 1 : -1])
        found.append(gradients[0].cpu())
    for dx in found[1:]:
        assert torch.equal(dx[[0, 2]], found[0][[0, 2]])
        assert dx[1].isnan().all()


def test_offsets_without_a_sample_hold_no_rows(kernels):
    case = Case("mul", "lora", dtype=torch.float32)
    t, _ = (kernels.take(each) for each in case.tensors())
    nothing = torch.zeros(0, dtype=torch.int64, device=kernels.device)
    call = forward_call(0, routing="mul", source="tokens", dtype=torch.float32)
    call = [a.to(kernels.device) if isinstance(a, torch.Tensor) else a for a in call]
    call[0], call[1], call[2], call[3] = t["x"].flatten(0, 1), t["A"], t["B"], t["y"]
    call[4:10] = [None] * 6
    call[10], call[12], call[16], call[23] = (
        nothing,
        torch.zeros(1, dtype=torch.int64, device=kernels.device),
        0,
        case.out,
    )
    with pytest.raises(RuntimeError, match="cu_seqlens has no samples for the 10 rows"):
        ops.BACKENDS[kernels].ops.forward(*call)
