"""What must hold whatever the numbers are: the identities of the operator, on every backend."""

import dataclasses

import pytest
import torch
from cases import EVERY, ROUTED, Case, worst

from routed_peft import ConditionState, StaleStateError, functional
from routed_peft.routes import ROUTES


def lora(t, backend, routing, condition, **options):
    return functional.routed_lora(
        t["x"], t["A"], condition, t["B"], routing=routing, scaling=0.7, backend=backend, **options
    )


@pytest.fixture
def t(backend):
    return backend.take(Case("gram", "lora", batch=3, dtype=backend.dtype).tensors()[0])


def test_none_is_lora(t, backend):
    assert worst(lora(t, backend, "none", None), 0.7 * t["x"] @ t["A"].T @ t["B"].T) < backend.close


def test_add_is_lora_of_the_sum(t, backend):
    y = t["y"][:, :1]
    assert worst(lora(t, backend, "add", y), 0.7 * (t["x"] + y) @ t["A"].T @ t["B"].T) < backend.close


def test_gram_of_one_token_is_rank_one(t, backend):
    y = t["y"][:, :1]
    v = y @ t["A"].T
    q, p = v @ t["A"], v @ t["B"].T
    assert worst(lora(t, backend, "gram", y), 0.7 * (t["x"] @ q.mT) * p) < backend.close
    # and a matrix state made by hand from it gives the same
    state = ConditionState("gram", (v.mT @ v).contiguous())
    assert worst(lora(t, backend, "gram", y), lora(t, backend, "gram", state)) < backend.close


@pytest.mark.parametrize("routing", ["add", "mul", "expand"])
def test_elementwise_is_per_token(routing, backend):
    case = Case(routing, "lora", m=5, pool="none", dtype=backend.dtype)
    t, _ = case.tensors()
    whole = case.run(t, {}, backend)
    for n in range(5):
        one = {**t, "x": t["x"][:, n : n + 1], "y": t["y"][:, n : n + 1]}
        assert worst(case.run(one, {}, backend), whole[:, n : n + 1]) < backend.close


@pytest.mark.parametrize("routing", EVERY)
@pytest.mark.parametrize("form", ["linear", "adapter"])
def test_zero_up_projection(routing, form, backend):
    """Output equals the base layer's, dA = 0, and B still learns."""
    case = Case(routing, form, dtype=backend.dtype)
    t, constant = case.tensors()
    t["B"].zero_()
    t = {k: v.requires_grad_() for k, v in t.items()}
    out = case.run(t, constant, backend)
    base = t["x"] @ t["W"].T + t["bias"] if form == "linear" else t["x"] + t["b_up"]
    assert worst(out, base) < backend.close
    (out * torch.randn_like(out)).sum().backward()
    assert not t["A"].grad.any()
    assert t["B"].grad.abs().max() > 1e-3


@pytest.mark.parametrize("routing", ROUTED)
def test_index_is_a_repeated_condition(routing, backend):
    case = Case(routing, "lora", batch=4, index=(1, 0, 1, 2), masked=True, dtype=backend.dtype)
    t, constant = case.tensors()
    rows = constant.pop("index")
    repeated = {**t, "y": t["y"][rows]}
    want = case.run(repeated, {**constant, "mask": constant["mask"][rows]}, backend)
    assert worst(case.run(t, {**constant, "index": rows}, backend), want) < backend.close


@pytest.mark.parametrize("padding", [0.0, 1e4, float("nan"), float("inf")])
@pytest.mark.parametrize("pool", ["auto", "mean", "first"])
@pytest.mark.parametrize("routing", ROUTED)
def test_padding_never_leaks(routing, pool, padding, backend):
    """Padded and masked equals unpadded, in values and in every gradient, whatever lies in the padding."""
    case = Case(routing, "linear", pool=pool, d_c=4, dtype=backend.dtype)
    t, _ = case.tensors()
    padded_y = torch.full((2, 7, 4), padding, dtype=backend.dtype)
    padded_y[:, 2:6] = t["y"]
    mask = torch.zeros(2, 7, dtype=torch.int64)
    mask[:, 2:6] = 1

    def gradients(y, **constant):
        leaves = {k: v.clone().requires_grad_() for k, v in {**t, "y": y}.items()}
        out = case.run(leaves, constant, backend)
        out.square().sum().backward()
        return out, {k: v.grad for k, v in leaves.items()}

    (out, want), (padded_out, got) = gradients(t["y"]), gradients(padded_y, mask=mask)
    assert worst(padded_out, out) < backend.close
    assert not got["y"][mask == 0].any(), "gradient of the padding is exactly zero"
    got["y"] = got["y"][:, 2:6]
    for name in want:
        assert worst(got[name], want[name]) < 10 * backend.close, name


@pytest.mark.parametrize("routing", EVERY)
def test_varlen_is_sample_by_sample(routing, backend):
    case = Case(routing, "lora", varlen=True, batch=4, d_c=4, dtype=backend.dtype)
    t, constant = case.tensors()
    got = case.run(t, constant, backend)
    cu = constant["cu_seqlens"].tolist()
    cc = constant.get("condition_cu_seqlens", torch.zeros(5, dtype=torch.int64)).tolist()
    single = dataclasses.replace(case, varlen=False)
    for i in range(4):
        one = {**t, "x": t["x"][None, cu[i] : cu[i + 1]]}
        if "y" in t:
            one["y"] = t["y"][None, cc[i] : cc[i + 1]]
        assert worst(got[cu[i] : cu[i + 1]], single.run(one, {}, backend)[0]) < backend.close


@pytest.mark.parametrize("routing", ROUTED)
def test_order_of_condition_tokens_does_not_matter(routing, backend):
    case = Case(routing, "lora", dtype=backend.dtype)
    t, _ = case.tensors()
    turned = {**t, "y": t["y"].flip(1)}
    assert worst(case.run(t, {}, backend), case.run(turned, {}, backend)) < backend.close


@pytest.mark.parametrize("routing", ["gram", "gram_relu", "ones"])
def test_scale_by_tokens(routing, backend):
    """ "tokens" divides by the valid tokens; the same for one token."""
    for m, masked, count in ((4, False, 4), (1, False, 1), (4, True, 2)):
        case = Case(routing, "lora", batch=1, m=m, dtype=backend.dtype)
        t, _ = case.tensors()
        constant = {"mask": torch.tensor([[1, 0, 1, 0]])} if masked else {}
        unscaled = dataclasses.replace(case, scale="none").run(t, constant, backend)
        assert worst(case.run(t, constant, backend) * count, unscaled) < backend.close


def test_flat_rows_and_strided_inputs(t, backend):
    want = lora(t, backend, "gram", t["y"])
    assert torch.equal(lora({**t, "x": t["x"].flatten(0, 1)}, backend, "gram", t["y"]), want.flatten(0, 1))
    wide = torch.randn(3, 5, 11, dtype=backend.dtype, device=backend.device)
    wide[..., 2:8] = t["x"]
    columns = {k: v.T.contiguous().T for k, v in t.items() if k in "AB"}
    spread = torch.randn(3, 8, 6, dtype=backend.dtype, device=backend.device)
    spread[:, ::2] = t["y"]
    assert worst(lora({**columns, "x": wide[..., 2:8]}, backend, "gram", spread[:, ::2]), want) < backend.close
    assert (
        worst(lora({**t, "x": t["x"].expand(3, 5, 6)}, backend, "gram", t["y"].transpose(1, 2).clone().mT), want)
        < backend.close
    )


@pytest.mark.parametrize("routing", ROUTED)
def test_beams_use_their_prompts_condition(routing, backend):
    """k rows a condition, as generate() lays beams out, when no gradient is asked for."""
    t = backend.take(Case(routing, "lora", batch=6, dtype=backend.dtype).tensors()[0])
    y = t["y"][:2]
    with torch.no_grad():
        got = lora(t, backend, routing, y)
        want = lora(t, backend, routing, y.repeat_interleave(3, 0))
    assert worst(got, want) < backend.close


@pytest.mark.parametrize("routing", ["gram", "mul"])
def test_dropout_masks_are_one(routing, backend):
    """The update's part of dx is zero exactly where x was dropped, and so is dy's; another seed drops elsewhere."""
    case = Case(routing, "lora", n=40, d=130, m=3, d_c=70, dropout=0.25, dtype=backend.dtype)
    t, constant = case.tensors()
    zeros = []
    for seed in (5, 5, 6):
        leaves = {k: v.clone().requires_grad_() for k, v in t.items()}
        case.run(leaves, constant, backend, seed=seed).sum().backward()
        zeros.append((leaves["x"].grad == 0, leaves["y"].grad == 0))
    assert torch.equal(zeros[0][0], zeros[1][0]) and torch.equal(zeros[0][1], zeros[1][1])
    assert not torch.equal(zeros[0][0], zeros[2][0])
    assert 0.2 < zeros[0][0].double().mean() < 0.3
    dropped = zeros[0][0]
    changed = {**t, "x": torch.where(dropped, torch.randn_like(t["x"]), t["x"])}
    assert torch.equal(case.run(t, constant, backend), case.run(changed, constant, backend))


def test_a_state_is_stale_after_an_optimizer_step(backend):
    t = backend.take(Case("gram", "lora", dtype=backend.dtype).tensors()[0])
    a = t["A"].requires_grad_()
    state = functional.encode_condition(t["y"], a, routing="gram", backend=backend)
    lora(t, backend, "gram", state).sum().backward()
    torch.optim.SGD([a], lr=0.1).step()
    with pytest.raises(StaleStateError, match="before the parameters changed"):
        lora(t, backend, "gram", state)


def test_every_route_has_its_own_pooling():
    assert {name: route.pool for name, route in ROUTES.items() if route.pool == "mean"}.keys() == {
        "add",
        "mul",
        "expand",
        "cross_gram",
    }


@pytest.mark.parametrize("offsets", [[0, 2, 2], [0, 2, 4, 4, 4]])
def test_a_ragged_mean_does_not_depend_on_its_batch(offsets):
    """As many rows as conditions are not yet one row each, whose mean bfloat16 would hold."""
    torch.manual_seed(0)
    x = torch.randn(len(offsets) - 1, 3, 64, dtype=torch.bfloat16)
    y, A, B = (torch.randn(*size).bfloat16() for size in ((offsets[-1], 64), (16, 64), (40, 16)))
    options = dict(routing="mul", pool="mean", scaling=1.0, backend="cpu")
    together = functional.routed_lora(x, A, y, B, condition_cu_seqlens=torch.tensor(offsets), **options)
    alone = functional.routed_lora(x[:1], A, y[:2], B, condition_cu_seqlens=torch.tensor([0, 2]), **options)
    assert torch.equal(together[:1], alone)


@pytest.mark.parametrize("k", [0.5, 1.5, 2.5])
def test_a_dropout_probability_halfway_between_two_that_there_are(k):
    x, A, B, seed = torch.ones(1, 2000, 512).double(), torch.ones(1, 512), torch.ones(1, 1), torch.tensor([3])
    options = dict(routing="none", scaling=1.0, dropout_p=k / 65536, seed=seed)
    got, want = (functional.routed_lora(x, A, None, B, backend=who, **options) for who in ("cpu", "reference"))
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("form", ["linear", "state"])
@pytest.mark.parametrize("routing", ["expand", "gram", "ones"])
def test_a_few_rows_of_a_bank_of_conditions(routing, form, native):
    """Which are not worth a vector for each condition."""
    case = Case(routing, form, n=1, pool="mean", index=(0, 9), dtype=native.dtype)
    want, got = case.gradients("reference", dtype=torch.float64), case.gradients(native)
    for name, exact in want.items():
        assert worst(got[name].double(), exact) < native.close, name


@pytest.mark.parametrize("routing", ["expand", "gram", "ones"])
@pytest.mark.parametrize("conditions", [0, 256, 257, 600])
def test_rank_one_sums_the_weights_gradients_of_all_its_blocks_of_conditions(routing, conditions):
    torch.manual_seed(0)
    x, y = (torch.randn(conditions, n, 24, dtype=torch.float64) for n in (2, 1))
    A, B = torch.randn(8, 24, dtype=torch.float64), torch.randn(40, 8, dtype=torch.float64)

    def gradients(backend):
        a, b = A.clone().requires_grad_(), B.clone().requires_grad_()
        functional.routed_lora(x, a, y, b, routing=routing, scaling=0.5, backend=backend).sum().backward()
        return a.grad, b.grad

    for _ in range(20):
        poison = [torch.full_like(t, torch.nan) for t in (A, B) for _ in range(4)]
        del poison  # what is left unwritten would be one of these
        for got, want in zip(gradients("cpu"), gradients("reference"), strict=True):
            torch.testing.assert_close(got, want)
