"""The definition against the paper's formulas, written out sample by sample, and its dropout against known answers."""

import pytest
import torch
from cases import EVERY, ROUTED, Case

from routed_peft import functional
from routed_peft.reference import dropout_multiplier, philox, run
from routed_peft.routes import ROUTES


def by_hand(routing, t, v, scale):
    """ρ for one sample, T [N, R] and V [M, R], as the table of routes prints it."""
    n, m = len(t), len(v)
    pooled = v.mean(0)
    count = m if scale == "tokens" else 1
    z = torch.empty_like(t)
    for row in range(n):
        x = t[row]
        if routing == "none":
            z[row] = x
        elif routing == "add":
            z[row] = x + pooled
        elif routing == "mul":
            z[row] = x * pooled
        elif routing == "expand":
            z[row] = x.sum() * pooled
        elif routing == "gram":
            z[row] = sum((x @ v[k]) * v[k] for k in range(m)) / count
        elif routing == "gram_relu":
            z[row] = sum((x.relu() @ v[k].relu()) * v[k] for k in range(m)) / count
        elif routing == "cross_gram":
            z[row] = sum((x @ t[k]) * pooled for k in range(n))
        elif routing == "ones":
            z[row] = sum(x @ v[k] for k in range(m)) / count
        elif routing == "gram_reshape":
            z[row] = (t @ v.reshape(t.shape[1], m) @ v)[row]
    return z


@pytest.mark.parametrize("scale", ["tokens", "none"])
@pytest.mark.parametrize("routing", [*EVERY, "gram_reshape"])
def test_formulas(routing, scale):
    b, n, m, d, d_c, r, o = 3, 4, 5, 7, 6, 3, 8
    x, y = torch.randn(b, n, d), torch.randn(b, m, d_c)
    down, c, up = torch.randn(r, d), torch.randn(r, d_c), torch.randn(o, r)
    want = torch.stack([0.5 * by_hand(routing, x[i] @ down.T, y[i] @ c.T, scale) @ up.T for i in range(b)])
    got = functional.routed_lora(x, down, y, up, c, routing=routing, scaling=0.5, scale=scale, backend="reference")
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("routing", [r for r in ROUTED if ROUTES[r].state == "tokens"])
def test_token_by_token(routing):
    """M = N without pooling: add, mul and expand pair tokens, cross_gram is T (TᵀV)."""
    b, n, d, r, o = 2, 4, 7, 3, 8
    x, y, down, up = torch.randn(b, n, d), torch.randn(b, n, d), torch.randn(r, d), torch.randn(o, r)
    t, v = x @ down.T, y @ down.T
    z = {
        "add": t + v,
        "mul": t * v,
        "expand": t.sum(-1, keepdim=True) * v,
        "cross_gram": t @ (t.transpose(1, 2) @ v),
    }[routing]
    got = functional.routed_lora(x, down, y, up, routing=routing, scaling=2.0, pool="none", backend="reference")
    torch.testing.assert_close(got, 2 * z @ up.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["gelu", "gelu_tanh", "relu", "silu", "none"])
def test_adapter_routes_before_the_activation(name):
    x, y = torch.randn(2, 4, 6), torch.randn(2, 1, 6)
    down, b_down, up, b_up = torch.randn(3, 6), torch.randn(3), torch.randn(6, 3), torch.randn(6)
    act = {
        "gelu": torch.nn.functional.gelu,
        "gelu_tanh": lambda z: torch.nn.functional.gelu(z, approximate="tanh"),
        "relu": torch.relu,
        "silu": torch.nn.functional.silu,
        "none": lambda z: z,
    }[name]
    want = x + act((x @ down.T + b_down) * (y @ down.T + b_down)) @ up.T + b_up
    got = functional.routed_adapter(x, y, down, b_down, up, b_up, routing="mul", activation=name, backend="reference")
    torch.testing.assert_close(got, want)


def test_mixed_slices_differ_for_gram_and_agree_for_add():
    for routing, same in (("gram", False), ("expand", False), ("add", True), ("mul", True)):
        outs = []
        for across in (False, True):
            case = Case(routing, "lora", slices=True, across=across)
            t, constant = case.tensors()
            outs.append(case.run(t, constant, "reference"))
        assert torch.allclose(*outs) == same


# Philox4x32-7 for counters and keys of all zeros, all ones and the digits of pi: the known-answer vectors that its
# authors publish with Random123.
KNOWN = [
    ((0, 0, 0, 0), 0, (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
    ((2**32 - 1,) * 4, 2**64 - 1, (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        0x299F31D0A4093822,
        (0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A),
    ),
]


@pytest.mark.parametrize("counter, key, want", KNOWN)
def test_philox_known_answers(counter, key, want):
    seed = torch.tensor(key - 2**64 if key >= 2**63 else key)
    assert tuple(int(w) for w in philox(seed, *map(torch.tensor, counter))) == want


def test_dropout_multiplier():
    seed = torch.tensor([1234])
    p = 0.3
    m = dropout_multiplier(seed, 500, 200, p, stream=0)
    kept = m[m != 0]
    k = round(65536 * p)
    assert kept.unique().tolist() == [65536 / (65536 - k)]
    rate = len(kept) / m.numel()
    assert abs(rate - (1 - p)) < 5 * (p * (1 - p) / m.numel()) ** 0.5
    assert torch.equal(dropout_multiplier(seed, 20, 70, p, 0), m[:20, :70]), "the map is by coordinates, not by shape"
    assert not torch.equal(dropout_multiplier(seed, 500, 200, p, stream=1), m)
    assert not dropout_multiplier(seed, 3, 5, 1.0, 0).any()
    for other in (m.roll(1, 0), m.roll(1, 1), dropout_multiplier(seed + 1, 500, 200, p, 0)):
        assert abs(torch.corrcoef(torch.stack([m.flatten(), other.flatten()]))[0, 1]) < 0.02


def test_no_samples_have_tokens_all_the_same():
    A, B = torch.randn(3, 8), torch.randn(6, 3)
    x, nobody = torch.randn(0, 5, 8), torch.zeros(0, 5, dtype=torch.bool)
    given = {"in sequence": (None, {"mask": nobody}), "cross_gram": (torch.randn(0, 2, 8), {"input_mask": nobody})}
    for routing, (y, more) in zip(("mul", "cross_gram"), given.values(), strict=True):
        for backend in ("reference", "cpu"):
            out = functional.routed_lora(x, A, y, B, routing=routing, scaling=1.0, backend=backend, **more)
            assert out.shape == (0, 5, 6)


def test_a_row_without_a_condition_is_nan():
    A, B = torch.randn(3, 8), torch.randn(6, 3)
    for y, routing in ((torch.randn(2, 4, 8), "gram"), (torch.randn(2, 8), "mul")):
        t = (torch.randn(3, 5, 8), A, B, y, None, None, None, None, None)
        found = []
        for last in (1, -1, 2):
            numbers = dict(scaling=1.0, dropout=0.0, condition_dropout=0.0, residual=False, route_across_slices=False)
            names = dict(routing=routing, scale="tokens", pool="auto", activation="none", backend="auto")
            asked = functional.Asked(state_of=None, out_slices=(), out_features=None, **numbers, **names)
            others = (None, torch.tensor([1, 0, 1]), None, None, None, None)
            options = functional.check_call("layer", torch.float32, asked, (*t, None), others)
            index = torch.tensor([1, 0, last])
            found.append(run((*t, None, index, None, None, None, None, None), options))
        assert torch.equal(found[0][:2], found[1][:2]) and found[0].isfinite().all()
        assert found[1][2].isnan().all() and found[2][2].isnan().all()
