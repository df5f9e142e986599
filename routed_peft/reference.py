"""The definition of the routed bottleneck in plain torch.

Everything else in this library must agree with this file; the tests say so, and ``backend="reference"`` runs it. It is
written to be read: one formula a line, no speed tricks, autograd does the gradients.

Source: Qu, Tuytelaars, Moens, "Introducing Routing Functions to Vision-Language Parameter-Efficient Fine-Tuning with
Low-Rank Bottlenecks", ECCV 2024 (arXiv 2403.09377).

Shapes: B samples, N input tokens, M condition tokens; d, d_c, o input, condition and output widths; R bottleneck
width. Unless ``groups`` is 1, the R columns are ``groups`` independent bottlenecks of w = R / groups columns.

    T = drop(X) Aᵀ + b_down   [B, N, R]        V = drop(Y) Cᵀ + b_C   [B, M, R], zero in masked rows
    out = base + s · act(ρ(T, V)) B̂ᵀ           B̂ is block-diagonal over the output slices
"""

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .routes import state_kind


class Options(NamedTuple):
    """What a routed call is, apart from its tensors. The C++ ops take the same list, as numbers."""

    samples: int  # B
    routing: str
    source: str  # "none" | "tokens" (condition is y) | "state" (condition is a state) | "in_sequence" (y is x)
    pool: str  # resolved: "mean" | "first" | "none"
    scale: str  # "tokens" | "none"
    groups: int  # independent bottlenecks
    slices: tuple[int, ...]  # start and stop of each output slice, flattened; () is the whole output
    out_features: int
    scaling: float
    dropout: float
    condition_dropout: float
    activation: str
    residual: bool


# ------------------------------------------------------------------------------------------------ dropout
def philox(seed: Tensor, c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor) -> tuple[Tensor, ...]:
    """Philox4x32-7 (Salmon et al., SC 2011): four 32-bit words for each counter, held in int64 tensors."""
    low = 0xFFFFFFFF
    k0, k1 = seed & low, (seed >> 32) & low
    for _ in range(7):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # int64 wraps around, which keeps all 64 bits
        c0, c1, c2, c3 = ((p1 >> 32) & low) ^ c1 ^ k0, p1 & low, ((p0 >> 32) & low) ^ c3 ^ k1, p0 & low
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    return c0, c1, c2, c3


def dropout_multiplier(
    seed: Tensor, rows: int, cols: int, p: float, stream: int, dtype: torch.dtype = torch.float64
) -> Tensor:
    """What dropout multiplies a [rows, cols] matrix by: 0, or 65536 / (65536 - k) with k = round(65536 p).

    The fixed map, the same on every device: element (row, c) belongs to call (row, 4·(c/64) + q, 2·stream + slot/8) and
    takes halfword slot % 8 of it, where t = c % 16, q = (t % 8) / 2 and slot = 4·((c % 64) / 16) + 2·(t / 8) + t % 2.
    It is dropped if its halfword is below k. Stream 0 is X, stream 1 is Y. ``seed`` is one int64, as a tensor.
    """
    k = round(65536 * p)
    if k == 65536:
        return torch.zeros(rows, cols, dtype=dtype, device=seed.device)
    row = torch.arange(rows, device=seed.device)[:, None]
    c = torch.arange(cols, device=seed.device)[None, :]
    t = c % 16
    slot = 4 * ((c % 64) // 16) + 2 * (t // 8) + t % 2
    words = philox(
        seed.reshape(()),
        row & 0xFFFFFFFF,
        row >> 32,
        4 * (c // 64) + (t % 8) // 2,
        2 * stream + slot // 8,
    )
    word = torch.stack(torch.broadcast_tensors(*words))  # type: ignore[no-untyped-call]
    chosen = word.gather(0, ((slot % 8) // 2).expand(rows, cols)[None])[0]
    halfword = (chosen >> (16 * (slot % 2))) & 0xFFFF
    return (halfword >= k).to(dtype) * (65536 / (65536 - k))


def _drop(x: Tensor, p: float, seed: Tensor | None, stream: int) -> Tensor:
    if p == 0:
        return x
    if seed is None:
        raise ValueError("dropout needs a seed")
    rows = x.reshape(-1, x.shape[-1])
    multiplier = dropout_multiplier(seed, rows.shape[0], rows.shape[1], p, stream, x.dtype)
    return (rows.masked_fill(multiplier == 0, 0) * multiplier).reshape(x.shape)  # select: what is dropped may be NaN


# ------------------------------------------------------------------------------------------------ layout
def _pad(flat: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """Flat rows [ΣN_i, d] -> [B, max N_i, d], zeros behind the end of each sample; and the valid positions [B, max]."""
    bounds = cu_seqlens.tolist()
    longest = max((b - a for a, b in zip(bounds, bounds[1:], strict=False)), default=0)
    pieces = [F.pad(flat[a:b], (0, 0, 0, longest - (b - a))) for a, b in zip(bounds, bounds[1:], strict=False)]
    lengths = cu_seqlens[1:] - cu_seqlens[:-1]
    if not pieces:
        return flat.new_empty(0, 0, flat.shape[1]), torch.empty(0, 0, dtype=torch.bool, device=flat.device)
    return torch.stack(pieces), torch.arange(longest, device=flat.device) < lengths[:, None]


def _split(t: Tensor, groups: int) -> Tensor:
    """[B, N, R] -> [B, groups, N, w]."""
    return t.reshape(*t.shape[:2], groups, t.shape[2] // groups).transpose(1, 2)


def _join(t: Tensor) -> Tensor:
    """[B, groups, N, w] -> [B, N, R]."""
    return t.transpose(1, 2).flatten(2)


# ------------------------------------------------------------------------------------------------ the condition
def encode(v: Tensor, valid: Tensor, options: Options) -> Tensor:
    """V [B, M, R] and its valid rows [B, M] -> the condition state, in float32 (float64 for float64).

    "vector" [B, R]; "matrix" [B, R, w]: the groups' w×w matrices below one another; "tokens" [B, M, R].
    """
    v = v.to(_accumulate_dtype(v)).masked_fill(~valid[..., None], 0)
    kind = state_kind(options.routing, options.pool, v.shape[1] == 1)
    count = valid.sum(1).clamp(min=1).to(v.dtype)[:, None]
    if kind == "vector":
        if options.pool == "mean":
            return v.sum(1) / count
        if options.pool == "first":
            first = valid & (valid.cumsum(1) == 1)
            return (v * first[..., None]).sum(1)
        u = v.sum(1)  # one token, or `ones`: Z = T Vᵀ 1 = (T·ΣV) 1
        return u / count if options.scale == "tokens" else u
    if kind == "tokens":
        return v
    vg = _split(v, options.groups)
    if options.routing == "gram":
        state = vg.mT @ vg
    elif options.routing == "gram_relu":
        state = vg.relu().mT @ vg
    else:  # gram_reshape, as published: the rows of V read as if they were columns
        return (vg.reshape(*vg.shape[:2], vg.shape[3], vg.shape[2]) @ vg).flatten(1, 2)
    return (state / count[..., None, None] if options.scale == "tokens" else state).flatten(1, 2)


def route(t: Tensor, state: Tensor | None, input_valid: Tensor, options: Options) -> Tensor:
    """Z = ρ(T, V) [B, N, R] from T [B, N, R] and the state of the condition."""
    if options.routing == "none" or state is None:
        return t
    kind = "vector" if state.dim() == 2 else "matrix" if options.routing.startswith("gram") else "tokens"
    tg = _split(t, options.groups)  # [B, groups, N, w]
    if kind == "matrix":
        s = state.reshape(state.shape[0], options.groups, state.shape[2], state.shape[2])
        return _join((tg.relu() if options.routing == "gram_relu" else tg) @ s)
    if options.routing == "cross_gram":
        tg_valid = tg.masked_fill(~input_valid[:, None, :, None], 0)
    vg = _split(state[:, None] if kind == "vector" else state, options.groups)  # [B, groups, 1 or N, w]
    if options.routing == "add":
        z = tg + vg
    elif options.routing == "mul":
        z = tg * vg
    elif options.routing == "expand":
        z = tg.sum(-1, keepdim=True) * vg
    elif options.routing == "gram":
        z = (tg @ vg.mT) @ vg
    elif options.routing == "gram_relu":
        z = (tg.relu() @ vg.relu().mT) @ vg
    elif options.routing == "cross_gram" and kind == "vector":
        z = (tg @ tg_valid.sum(2, keepdim=True).mT) * vg
    elif options.routing == "cross_gram":
        z = tg @ (tg_valid.mT @ vg)
    elif options.routing == "ones":
        z = (tg @ vg.mT).expand(tg.shape)
    else:
        raise ValueError(f"unknown routing {options.routing!r}")
    return _join(z)


# ------------------------------------------------------------------------------------------------ the layer
def up_project(z: Tensor, b: Tensor, options: Options) -> Tensor:
    """Z B̂ᵀ: slice i of the output is block i of Z times its own rows of B; zero outside the slices."""
    if not options.slices:
        return F.linear(z, b)
    bounds = list(zip(options.slices[::2], options.slices[1::2], strict=True))
    lengths = [stop - start for start, stop in bounds]
    out = z.new_zeros(*z.shape[:-1], options.out_features)
    for (start, stop), zi, bi in zip(bounds, z.chunk(len(bounds), -1), torch.split(b, lengths), strict=True):
        out = out.slice_scatter(F.linear(zi, bi), -1, start, stop)
    return out


def activate(z: Tensor, name: str) -> Tensor:
    """The Adapter's activation, after the route."""
    if name == "gelu":
        return F.gelu(z)
    if name == "gelu_tanh":
        return F.gelu(z, approximate="tanh")
    if name == "relu":
        return F.relu(z)
    return F.silu(z) if name == "silu" else z


def encode_condition(
    y: Tensor,
    c: Tensor,
    b_c: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    seed: Tensor | None,
    options: Options,
) -> Tensor:
    """Y [B, M, d_c] (or flat rows with ``cu_seqlens``) -> the state of the condition."""
    padded, valid = y, None
    if cu_seqlens is not None:
        padded, valid = _pad(y, cu_seqlens)
    elif mask is not None:
        valid = mask
    if valid is not None and cu_seqlens is None:
        padded = padded.masked_fill(~valid[..., None], 0)  # select, so that NaN padding cannot leak
    if valid is None:
        valid = torch.ones(y.shape[:2], dtype=torch.bool, device=y.device)
    if options.condition_dropout and cu_seqlens is not None:
        padded, _ = _pad(_drop(y, options.condition_dropout, seed, stream=1), cu_seqlens)
    else:
        padded = _drop(padded, options.condition_dropout, seed, stream=1)
    v = F.linear(padded, c.to(y.dtype), None if b_c is None else b_c.to(y.dtype))
    return encode(v, valid, options)


def forward(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    condition: Tensor | None,
    c: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    b_down: Tensor | None,
    b_c: Tensor | None,
    mask: Tensor | None,
    index: Tensor | None,
    input_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    condition_cu_seqlens: Tensor | None,
    seed: Tensor | None,
    base: Tensor | None,
    options: Options,
) -> Tensor:
    """The routed layer: x [..., d] -> [..., o]. ``functional`` says what each argument is and checks it."""
    t = F.linear(
        _drop(x, options.dropout, seed, stream=0), a.to(x.dtype), None if b_down is None else b_down.to(x.dtype)
    )
    rows = t.reshape(-1, t.shape[-1])
    if cu_seqlens is None:
        tokens = math.prod(x.shape[1:-1]) if x.dim() > 2 else rows.shape[0] // max(options.samples, 1)
        t = rows.reshape(options.samples, tokens, rows.shape[1])
        present = torch.ones(t.shape[:2], dtype=torch.bool, device=x.device)
    else:
        t, present = _pad(rows, cu_seqlens)

    if options.source == "none":
        state = None
    elif options.source == "state":
        state = condition
    elif options.source == "in_sequence":
        assert mask is not None
        if cu_seqlens is not None:
            mask = _pad(mask[:, None], cu_seqlens)[0][..., 0]
        state = encode(t, mask & present, options)
    else:
        assert condition is not None
        state = encode_condition(
            condition, a if c is None else c, b_down if c is None else b_c, mask, condition_cu_seqlens, seed, options
        )
    if state is not None and index is not None:
        lost = (index < 0) | (index >= state.shape[0])  # NaN: no condition is another one's
        state = state[index.clamp(0, state.shape[0] - 1)]
        state = state.masked_fill(lost.reshape(-1, *[1] * (state.dim() - 1)), math.nan)

    input_valid = present if input_mask is None else present & input_mask
    z = activate(route(t.to(_accumulate_dtype(t)), state, input_valid, options), options.activation)
    z = z if x.dtype == torch.float16 else z.to(x.dtype)  # which Z may exceed
    z = z[present] if cu_seqlens is not None else z
    out = (options.scaling * up_project(z, b.to(x.dtype).to(z.dtype), options)).to(x.dtype)
    out = out.reshape(*x.shape[:-1], options.out_features)
    if weight is not None:
        out = F.linear(x, weight, None if bias is None else bias.to(x.dtype)) + out
    elif bias is not None:
        out = out + bias.to(x.dtype)
    if base is not None:
        out = base + out
    return x + out if options.residual else out


def _accumulate_dtype(t: Tensor) -> torch.dtype:
    return torch.float64 if t.dtype == torch.float64 else torch.float32


# ------------------------------------------------------------------------------------------------ as the backend
def as_tokens(y: Tensor) -> Tensor:
    """[B, d_c] -> [B, 1, d_c]."""
    return y[:, None] if y.dim() == 2 else y


def no_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Autocast off on ``device``; the meta device has none, and asking for it there is an error."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def run(tensors: tuple[Any, ...], options: Options) -> Tensor:
    """``forward`` with the tensors of the op of that name."""
    x, condition, condition_cu_seqlens = tensors[0], tensors[3], tensors[13]
    if options.source == "tokens" and condition_cu_seqlens is None:
        condition = as_tokens(condition)
    arguments: list[Any] = [*tensors[:3], condition, *tensors[4:], options]
    with no_autocast(x.device):
        return forward(*arguments)


def run_encode(y: Tensor, c: Tensor, b_c: Tensor | None, mask: Tensor | None, options: Options) -> Tensor:
    """``encode_condition`` with the tensors of the op ``encode``."""
    with no_autocast(y.device):
        return encode_condition(as_tokens(y), c, b_c, mask, None, None, options)
