"""Direct calls of the ops: their arguments, as the Python side makes them, and the fakes' word on the results."""

import torch
from layers import DC, OUT, B, D, M, N, R
from torch._subclasses.fake_tensor import FakeTensorMode

from routed_peft.routes import ACTIVATIONS, POOLS, ROUTES, SOURCES


def forward_arguments(
    routing="gram", source="tokens", pool="none", *, n=N, m=M, dropout=0.0, slices=(), groups=1, bias_down=False,
    activation="none", flat=False, dtype=torch.float32, residual=False, samples=B, index=False,
    bank=None,
):  # fmt: skip
    """What ``forward`` and ``backward`` share: no gradients wanted, which is how opcheck takes the ops."""
    width, out = R * max(len(slices) // 2, 1), D if residual else OUT
    rows = sum(b - a for a, b in zip(slices[::2], slices[1::2], strict=True)) or out

    def given(*shape, wanted=True):
        return torch.randn(*shape, dtype=dtype) if wanted else None

    projected, conditions = source == "tokens", bank or samples
    x, y = (
        given(samples * n, D) if flat else given(samples, n, D),
        given(samples * m, DC) if flat else given(conditions, m, DC),
    )
    C, b_C = given(width, DC, wanted=projected), given(width, wanted=projected and bias_down)
    numbers = (ROUTES[routing].code, POOLS[pool], 1, groups)
    condition = y if projected else None
    if source == "state":
        condition = torch.ops.routed_peft.encode(y, given(width, DC), None, None, *numbers, False)[0]
    mask = torch.tensor([[True, False, True, True, False]]).repeat(samples, 1) if source == "in_sequence" else None
    offsets = torch.tensor([0, 1, samples * n]) if flat else None
    condition_offsets = torch.tensor([0, 2, samples * m]) if flat and projected else None
    seed = torch.tensor([7]) if dropout else None
    turned = torch.arange(conditions).flip(0)[:samples] if index else None
    tensors = (
        x, given(width, D), given(rows, R), condition, C, given(out, D), given(out),
        given(width, wanted=bias_down), b_C, mask if mask is None or not flat else mask.flatten(), turned, None,
        offsets, condition_offsets, seed,
    )  # fmt: skip
    return *tensors, *(
        samples, numbers[0], SOURCES[source], *numbers[1:], list(slices), out, 0.5, dropout,
        dropout if projected else 0.0, ACTIVATIONS[activation], residual,
    )  # fmt: skip


# The gram routes go through V where a condition is short beside R, and else through S ("long").
CASES = {
    "none": {"routing": "none", "source": "none"},
    "matrix": {},
    "matrix, dropout": {"dropout": 0.3},
    "matrix, flat": {"flat": True},
    "matrix, bfloat16": {"dtype": torch.bfloat16},
    "matrix, float64": {"dtype": torch.float64},
    "gram_relu": {"routing": "gram_relu"},
    "matrix, long": {"n": 40, "m": 30, "dropout": 0.3},
    "matrix, long and flat": {"n": 40, "m": 30, "flat": True, "dtype": torch.float16},
    "gram_relu, long": {"routing": "gram_relu", "n": 40, "m": 30, "dtype": torch.bfloat16},
    "rank one, pooled": {"pool": "mean"},
    "rank one, single token": {"m": 1, "dropout": 0.3},
    "rank one, expand": {"routing": "expand", "pool": "first", "dtype": torch.bfloat16},
    "rank one, ones": {"routing": "ones"},
    "rank one, slices": {"pool": "mean", "slices": (0, 8, 16, 24), "groups": 2, "dropout": 0.3},
    "rank one, state": {"source": "state", "pool": "mean"},
    "rank one, state, index": {"source": "state", "pool": "mean", "index": True},
    "no rank one for a few of a bank": {"pool": "mean", "index": True, "bank": 2 * B + 1, "n": 2, "dropout": 0.3},
    "no rank one for a few of a bank's states": {"source": "state", "pool": "mean", "index": True, "bank": 20, "n": 1},
    "vector": {"routing": "add", "pool": "mean"},
    "vector, no rank one": {"pool": "mean", "bias_down": True, "activation": "gelu", "residual": True},
    "vector, float16": {"routing": "cross_gram", "pool": "mean", "dropout": 0.3, "dtype": torch.float16},
    "tokens": {"routing": "mul", "m": N},
    "tokens, state": {"routing": "mul", "source": "state", "m": N},
    "matrix, state": {"source": "state"},
    "matrix, state, index": {"source": "state", "index": True, "dtype": torch.bfloat16},
    "matrix, slices": {"slices": (0, 8, 16, 24), "groups": 2},
    "matrix, slices, long": {"slices": (0, 8, 16, 24), "groups": 2, "n": 30, "m": 40},
    "matrix, slices mixed": {"slices": (0, 8, 16, 24), "groups": 1, "dropout": 0.3},
    "matrix, slices, state": {"source": "state", "slices": (0, 8, 16, 24), "groups": 2},
    "in sequence": {"source": "in_sequence", "dropout": 0.3},
    "in sequence, empty": {"source": "in_sequence", "samples": 0},
    "in sequence, flat": {"source": "in_sequence", "flat": True},
    "in sequence, pooled": {"routing": "mul", "source": "in_sequence", "pool": "mean"},
}
TENSORS = 15


def forward_call(save, base=False, **case):
    """All arguments of ``forward``."""
    arguments = forward_arguments(**case)
    x, out_features = arguments[0], arguments[TENSORS + 7]
    given = torch.randn(*x.shape[:-1], out_features, dtype=x.dtype) if base else None
    return *arguments[:TENSORS], given, *arguments[TENSORS:], save


def infer_call(**case):
    """All arguments of ``infer``, for a call that has no other tensors and no dropout; and its ``forward_call``."""
    call = forward_call(0, **case)
    x, A, up, condition, _, weight, bias = call[:7]
    samples, routing, source, pool, scale, groups, slices, out, scaling, p, condition_p, activation, residual, _ = call[
        TENSORS + 1 :
    ]
    index = call[10]
    assert all(t is None for t in (call[4], *call[7:10], *call[11:TENSORS])) and p == condition_p == 0
    choices = routing | source << 8 | pool << 16 | scale << 24 | activation << 32 | residual << 40 | groups << 48
    return (x, A, up, condition, weight, bias, call[TENSORS], index, samples, choices, slices, out, scaling), call


def backward_call(ops, needs, save=2, **case):
    """All arguments of ``backward``, with what the forward of ``ops`` saves."""
    call = forward_call(save, **case)
    out, t, state, kept = ops.forward(*call)
    return needs, torch.randn_like(out), t, state, kept, *call[:TENSORS], *call[TENSORS + 1 : -1]


def assert_fake_is_real(op, arguments):
    """Shapes, strides and dtypes of all outputs, as the tracer is told them."""
    real = op(*arguments)
    several = isinstance(real, tuple)
    with FakeTensorMode() as mode:
        fake = op(*(mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in arguments))
    for i, (a, b) in enumerate(zip(fake, real, strict=True) if several else [(fake, real)]):
        assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype), f"output {i} of {op}"
