"""The same layer, written in every way that a user might have it: routed_peft, and what it is timed against.

A peer is made for a :class:`Layer` and called with one of its inputs. All give the layer's output and, by autograd, the
gradients of x, A and B; the condition and the base layer are frozen, and A projects the condition too, as in the paper.
The floors compute something else: ``base`` has no update, PEFT's and the other libraries' LoRA has no route and no
slices (where ours has slices, theirs has rank R for all of the output, which takes twice the products). :func:`check`
holds a peer against the definition in float64 before it is timed.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from shapes import Shape
from torch import Tensor, nn

from routed_peft import functional

SCALING = 0.5
Forward = Callable[[Tensor], Tensor]


class Unavailable(Exception):
    """This peer cannot run here, or not this shape; the text says why."""


class Layer:
    """Random tensors of a shape: B is random as well, for products with zeros are faster than others.

    Attributes:
        x: ``calls`` inputs [batch, n, d], so that a cache need not hold the next one already.
        dout: as many gradients of the output [batch, n, out].
    """

    def __init__(self, shape: Shape, dtype: torch.dtype, device: str, calls: int = 1, seed: int = 0):
        self.shape, self.dtype, self.device = shape, dtype, device
        self.generator = torch.Generator(device).manual_seed(seed)
        s = shape
        self.x = [self.random(s.batch, s.n, s.d) for _ in range(calls)]
        self.dout = [self.random(s.batch, s.n, s.out) for _ in range(calls)]
        self.y = self.random(s.batch, s.m, s.d)
        self.A, self.B = self.random(s.width, s.d, scale=s.d**-0.5), self.random(s.adapted, s.r, scale=s.r**-0.5)
        self.W, self.bias = self.random(s.out, s.d, scale=s.d**-0.5), self.random(s.out)
        if not s.cached:
            for leaf in self.leaves():
                leaf.requires_grad_()

    def random(self, *sizes: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*sizes, generator=self.generator, device=self.device) * scale).to(self.dtype)

    def leaves(self) -> list[Tensor]:
        """What gets a gradient."""
        return [*self.x, self.A, self.B]

    def blocks(self) -> list[tuple[slice, slice, slice]]:
        """For each adapted slice its columns of the output, its rows of B and its columns of the bottleneck."""
        found, row = [], 0
        for i, (start, stop) in enumerate(self.shape.slices or [(0, self.shape.out)]):
            rows = slice(row, row + stop - start)
            found.append((slice(start, stop), rows, slice(i * self.shape.r, (i + 1) * self.shape.r)))
            row = rows.stop
        return found

    def options(self) -> dict:
        s = self.shape
        return dict(routing=s.routing, scaling=SCALING, out_slices=s.slices, route_across_slices=s.merged)


# ---- the layer with its route


def ours(layer: Layer, backend: str = "auto") -> Forward:
    """routed_peft."""
    condition = layer.y
    if layer.shape.cached:
        condition = functional.encode_condition(layer.y, layer.A, routing=layer.shape.routing, backend=backend)
    options = dict(layer.options(), dropout_p=layer.shape.dropout, backend=backend)
    return lambda x: functional.routed_linear(x, layer.W, layer.bias, condition, layer.A, layer.B, **options)


def eager(layer: Layer) -> Forward:
    """As one writes it in torch. A cached condition is V, projected."""
    s, blocks = layer.shape, layer.blocks()

    def project() -> Tensor:
        v = F.linear(F.dropout(layer.y, s.dropout), layer.A)
        return v.mean(1, keepdim=True) if s.pooled and s.m > 1 else v

    cached = project() if s.cached else None

    def forward(x: Tensor) -> Tensor:
        h, v = F.linear(F.dropout(x, s.dropout), layer.A), project() if cached is None else cached
        if s.routing == "gram":
            z = h @ v.mT @ v / s.m
        elif s.routing == "expand":
            z = h @ v.expand(-1, s.width, -1)
        else:
            z = h + v if s.routing == "add" else h * v
        out = F.linear(x, layer.W, layer.bias)
        if not s.merged:
            return out + F.linear(z, layer.B) * SCALING
        for columns, rows, block in blocks:
            out[..., columns] += F.linear(z[..., block], layer.B[rows]) * SCALING
        return out

    return forward


def published(layer: Layer) -> Forward:
    """The published module's formulation: factors in the order of the formula, expand with its copies of v as a matrix,
    the slices as a grouped convolution written into zeros, the condition projected at every call."""
    s = layer.shape
    adapted = torch.zeros(s.out, dtype=torch.bool, device=layer.device)
    for columns, _, _ in layer.blocks():
        adapted[columns] = True

    def up(z: Tensor) -> Tensor:
        if not s.merged:
            return F.linear(z, layer.B)
        after = F.conv1d(z.transpose(-2, -1), layer.B.unsqueeze(-1), groups=len(layer.blocks())).transpose(-2, -1)
        result = after.new_zeros(s.tokens, s.out)
        result[:, adapted] = after.reshape(s.tokens, s.adapted)
        return result.view(*after.shape[:-1], s.out)

    def forward(x: Tensor) -> Tensor:
        h, v = F.linear(F.dropout(x, s.dropout), layer.A), F.linear(F.dropout(layer.y, s.dropout), layer.A)
        if s.pooled and s.m > 1:
            v = v.mean(1, keepdim=True)
        if s.routing == "gram":
            z = h @ v.transpose(-2, -1) @ v / s.m
        elif s.routing == "expand":
            z = h @ v.expand(-1, s.width, -1).contiguous()
        else:
            z = h + v if s.routing == "add" else h * v
        return F.linear(x, layer.W, layer.bias) + up(z) * SCALING

    return forward


def compiled(layer: Layer) -> Forward:
    """torch.compile of eager, without donated buffers, which a backward that is repeated could not have."""
    torch._dynamo.reset()
    return torch.compile(eager(layer), fullgraph=True, dynamic=False)


def aten(layer: Layer) -> Forward:
    """The strongest form in plain torch: a hand-written backward, the cheaper order of gram, conditions pooled before
    they are projected, a rank-one route without any R-wide product, the update first and the base onto it."""
    node = RankOne if layer.shape.rank_one else General
    if layer.shape.cached:
        cached, _ = node.encode(layer, node.condition(layer))
        return lambda x: node.compute(layer, x, cached)[0]
    return lambda x: node.apply(layer, x, layer.A, layer.B)


def _drop(t: Tensor, p: float) -> tuple[Tensor, Tensor | None]:
    return torch.native_dropout(t, p, True) if p else (t, None)


def _undrop(gradient: Tensor, mask: Tensor | None, p: float) -> Tensor:
    return gradient if mask is None else torch.ops.aten.native_dropout_backward(gradient, mask, 1 / (1 - p))


class _Handwritten(torch.autograd.Function):
    """What both forms of ``aten`` share: the frame around their encode, compute and gradients."""

    @staticmethod
    def through_matrix(s: Shape) -> bool:
        """gram through S = VᵀV, where that takes fewer multiplications."""
        return s.cached or s.width * (s.n + s.m) < 2 * s.n * s.m

    @staticmethod
    def onto(layer: Layer, x: Tensor) -> Tensor:
        """The base layer's output, for slices to be added to."""
        return torch.addmm(layer.bias, x.view(-1, layer.shape.d), layer.W.t())

    @staticmethod
    def condition(layer: Layer) -> Tensor:
        """What is left of y after dropout: pooled [batch, d] where the route pools, else [batch, m, d]."""
        y, _ = _drop(layer.y, layer.shape.dropout)
        if not layer.shape.pooled:
            return y
        return y.mean(1) if layer.shape.m > 1 else y[:, 0]

    @staticmethod
    def dx(layer: Layer, update: Tensor, mask: Tensor | None, dout: Tensor) -> Tensor:
        dx = _undrop(update.view(layer.shape.batch, layer.shape.n, -1), mask, layer.shape.dropout)
        dx.view(-1, layer.shape.d).addmm_(dout, layer.W)
        return dx


class General(_Handwritten):
    @staticmethod
    def encode(layer: Layer, y: Tensor) -> tuple[Tensor, Tensor | None]:
        """v [batch, R] or V [batch, m, R]; or S = VᵀV / M [batch, R, R], and V beside it."""
        v = F.linear(y, layer.A)
        if layer.shape.pooled or not General.through_matrix(layer.shape):
            return v, None
        return torch.baddbmm(v.new_empty(1), v.mT, v, beta=0, alpha=1 / layer.shape.m), v

    @staticmethod
    def route(s: Shape, h: Tensor, state: Tensor) -> Tensor:
        if s.routing == "add":
            return h + state[:, None]
        if s.routing == "mul":
            return h * state[:, None]
        if General.through_matrix(s):
            return torch.bmm(h, state)
        return torch.bmm(torch.baddbmm(h.new_empty(1), h, state.mT, beta=0, alpha=1 / s.m), state)

    @staticmethod
    def compute(layer: Layer, x: Tensor, state: Tensor) -> tuple[Tensor, ...]:
        s = layer.shape
        dropped, mask = _drop(x, s.dropout)
        h = F.linear(dropped, layer.A)
        z = General.route(s, h, state)
        if s.merged:
            out = General.onto(layer, x)
            for columns, rows, block in layer.blocks():
                out[:, columns].addmm_(z.view(-1, s.width)[:, block], layer.B[rows].t(), alpha=SCALING)
        else:
            out = torch.addmm(layer.bias, z.view(-1, s.width), layer.B.t(), alpha=SCALING)
            out.addmm_(x.view(-1, s.d), layer.W.t())
        return out.view(s.batch, s.n, s.out), dropped, mask, h, z

    @staticmethod
    def forward(ctx, layer, x, A, B):
        y = General.condition(layer)
        state, v = General.encode(layer, y)
        out, dropped, mask, h, z = General.compute(layer, x, state)
        ctx.save_for_backward(dropped, mask, h, z, y, state, v)
        ctx.layer = layer
        return out

    @staticmethod
    def backward(ctx, dout):
        layer: Layer = ctx.layer
        s, blocks = layer.shape, layer.blocks()
        dropped, mask, h, z, y, state, v = ctx.saved_tensors
        dout = dout.reshape(-1, s.out)
        dz, dB = torch.empty_like(z), torch.empty_like(layer.B)
        z2, dz2 = z.view(-1, s.width), dz.view(-1, s.width)
        for columns, rows, block in blocks:
            d = dout[:, columns]
            torch.addmm(z2[:, block], d, layer.B[rows], beta=0, alpha=SCALING, out=dz2[:, block])
            torch.addmm(layer.B[rows], d.t(), z2[:, block], beta=0, alpha=SCALING, out=dB[rows])
        if s.routing == "add":
            dh, dv = dz, dz.sum(1)
        elif s.routing == "mul":
            dh, dv = dz * state[:, None], (dz * h).sum(1)
        elif v is not None:
            dh, ds = torch.bmm(dz, state.mT), torch.bmm(h.mT, dz)
            dv = torch.baddbmm(h.new_empty(1), v, ds + ds.mT, beta=0, alpha=1 / s.m)
        else:
            p = torch.baddbmm(h.new_empty(1), h, state.mT, beta=0, alpha=1 / s.m)
            dp = torch.baddbmm(h.new_empty(1), dz, state.mT, beta=0, alpha=1 / s.m)
            dh, dv = torch.bmm(dp, state), torch.bmm(dp.mT, h).baddbmm_(p.mT, dz)
        dh = dh.view(-1, s.width)
        dA = dh.t() @ dropped.view(-1, s.d)
        dA.addmm_(dv.reshape(-1, s.width).t(), y.reshape(-1, s.d))
        return None, General.dx(layer, dh @ layer.A, mask, dout), dA, dB


class RankOne(_Handwritten):
    @staticmethod
    def encode(layer: Layer, y: Tensor) -> tuple[Tensor, None]:
        """v [batch, R]."""
        return F.linear(y, layer.A), None

    @staticmethod
    def directions(layer: Layer, v: Tensor) -> tuple[Tensor, list[Tensor]]:
        """q [batch or 1, d] and each slice's p [batch, columns]: the update of a row is ⟨x, q⟩ p."""
        q = layer.A.sum(0, keepdim=True) if layer.shape.routing == "expand" else v @ layer.A
        return q, [SCALING * (v[:, block] @ layer.B[rows].t()) for _, rows, block in layer.blocks()]

    @staticmethod
    def compute(layer: Layer, x: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        s = layer.shape
        dropped, mask = _drop(x, s.dropout)
        q, ps = RankOne.directions(layer, v)
        c = dropped @ q[0, :, None] if len(q) == 1 else torch.bmm(dropped, q[:, :, None])
        if s.merged:
            out = RankOne.onto(layer, x).view(s.batch, s.n, s.out)
            for (columns, _, _), p in zip(layer.blocks(), ps, strict=True):
                out[..., columns].addcmul_(c, p[:, None])
        else:
            out = torch.addcmul(layer.bias, c, ps[0][:, None])
            out.view(-1, s.out).addmm_(x.view(-1, s.d), layer.W.t())
        return out, dropped, mask, c

    @staticmethod
    def forward(ctx, layer, x, A, B):
        pooled = RankOne.condition(layer)
        v, _ = RankOne.encode(layer, pooled)
        out, dropped, mask, c = RankOne.compute(layer, x, v)
        ctx.save_for_backward(dropped, mask, c, pooled, v)
        ctx.layer = layer
        return out

    @staticmethod
    def backward(ctx, dout):
        layer: Layer = ctx.layer
        s = layer.shape
        dropped, mask, c, pooled, v = ctx.saved_tensors
        q, ps = RankOne.directions(layer, v)
        dv, dB, dc = torch.empty_like(v), torch.empty_like(layer.B), torch.zeros_like(c)
        for (columns, rows, block), p in zip(layer.blocks(), ps, strict=True):
            d = dout[..., columns]
            dc.baddbmm_(d, p[:, :, None])
            dp = torch.bmm(c.mT, d)[:, 0]
            torch.addmm(v[:, block], dp, layer.B[rows], beta=0, alpha=SCALING, out=dv[:, block])
            torch.addmm(layer.B[rows], dp.t(), v[:, block], beta=0, alpha=SCALING, out=dB[rows])
        if s.routing == "expand":
            dA = dv.t() @ pooled
            dA += dc.view(1, -1) @ dropped.view(-1, s.d)
        else:
            dq = torch.bmm(dc.mT, dropped)[:, 0]
            dv.addmm_(dq, layer.A.t())
            dA = torch.addmm(v.t() @ dq, dv.t(), pooled)
        return None, RankOne.dx(layer, dc * q[:, None], mask, dout.reshape(-1, s.out)), dA, dB


# ---- floors: plain LoRA, or not even that


def base(layer: Layer) -> Forward:
    """The frozen layer alone."""
    return lambda x: F.linear(x, layer.W, layer.bias)


def _need(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise Unavailable(f"{package} is not installed")


def _plain_up(layer: Layer) -> Tensor:
    """A B for plain LoRA on the whole output, with R columns."""
    up = layer.random(layer.shape.out, layer.shape.width, scale=layer.shape.width**-0.5)
    return up if layer.shape.cached else up.requires_grad_()


def _peft(layer: Layer, autocast_adapter_dtype: bool) -> Forward:
    _need("peft")
    import peft

    s = layer.shape
    model = nn.Module()
    model.linear = nn.Linear(s.d, s.out, device=layer.device, dtype=layer.dtype)
    config = peft.LoraConfig(r=s.width, lora_alpha=SCALING * s.width, target_modules=["linear"], lora_dropout=s.dropout)
    peft.get_peft_model(model, config, autocast_adapter_dtype=autocast_adapter_dtype)
    adapted = model.linear
    with torch.no_grad():
        adapted.base_layer.weight.copy_(layer.W)
        adapted.base_layer.bias.copy_(layer.bias)
        adapted.lora_A["default"].weight.copy_(layer.A)
        adapted.lora_B["default"].weight.copy_(_plain_up(layer))
    return (adapted.requires_grad_(False) if s.cached else adapted).train()  # of the rest, PEFT froze the base layer


def peft_default(layer: Layer) -> Forward:
    """PEFT's LoRA as get_peft_model makes it: the adapter in float32."""
    if layer.dtype == torch.float32:
        raise Unavailable("the same as peft in float32")
    return _peft(layer, autocast_adapter_dtype=True)


def peft_same(layer: Layer) -> Forward:
    """PEFT's LoRA with the adapter in the base layer's dtype."""
    return _peft(layer, autocast_adapter_dtype=False)


def _need_gpu(layer: Layer, package: str) -> None:
    if layer.device == "cpu":
        raise Unavailable(f"{package}'s kernels need a GPU")
    _need(package)


def lorafusion(layer: Layer) -> Forward:
    """LoRAFusion's fused linear and LoRA."""
    _need_gpu(layer, "lorafusion")
    from lorafusion.ops.lora_v1 import fused_linear_lora

    up, p = _plain_up(layer), layer.shape.dropout

    def forward(x: Tensor) -> Tensor:
        return fused_linear_lora(x, layer.W, layer.A, up, alpha=SCALING, dropout_p=p, linear_bias=layer.bias)

    forward.trained = [layer.A, up]
    return forward


def unsloth(layer: Layer) -> Forward:
    """Unsloth's LoRA_W, which has neither dropout nor a bias."""
    _need_gpu(layer, "unsloth")
    if layer.shape.dropout:
        raise Unavailable("unsloth's LoRA_W has no dropout")
    from unsloth.kernels.fast_lora import LoRA_W

    up = _plain_up(layer)

    def forward(x: Tensor) -> Tensor:
        return LoRA_W.apply(x, layer.W, None, layer.A, up, SCALING)

    forward.trained = [layer.A, up]
    return forward


def capturable(name: str, shape: Shape) -> bool:
    """Whether a CUDA graph can hold a peer's call: a mask that picks columns is read by the host."""
    return not (name == "published" and shape.merged)


# Shown in this order. The first is what the others are compared with.
ROUTED = {"routed_peft": ours, "eager": eager, "published": published, "compile": compiled, "aten": aten}
FLOORS = {"base": base, "peft": peft_same, "peft default": peft_default, "lorafusion": lorafusion, "unsloth": unsloth}
PEERS = {**ROUTED, **FLOORS}


def trained(name: str, layer: Layer, forward: Forward) -> list[Tensor]:
    """What gets a gradient of a peer beside x: A and B, or what it has instead; base has nothing."""
    if name in ROUTED:
        return [layer.A, layer.B]
    if isinstance(forward, nn.Module):
        return [p for p in forward.parameters() if p.requires_grad]
    return getattr(forward, "trained", [])


# ---- is it the same?


def gradients(layer: Layer, forward: Forward) -> list[Tensor]:
    """The output for the first input and, unless the condition is cached, the gradients of x, A and B."""
    x, dout = layer.x[0], layer.dout[0]
    out = forward(x)
    if layer.shape.cached:
        return [out.detach()]
    return [out.detach(), *torch.autograd.grad(out, (x, layer.A, layer.B), dout)]


@functools.lru_cache(maxsize=1)  # for one peer after the other
def _definition(shape: Shape, dtype: torch.dtype, device: str) -> tuple[Layer, list[Tensor]]:
    """A layer, and what the definition makes of its numbers in float64."""
    layer, exact = Layer(shape, dtype, device), Layer(shape, torch.float64, device)
    with torch.no_grad():
        for tensor in ("y", "A", "B", "W", "bias"):
            getattr(exact, tensor).copy_(getattr(layer, tensor))
        exact.x[0].copy_(layer.x[0])
        exact.dout[0].copy_(layer.dout[0])
    return layer, gradients(exact, ours(exact, backend="reference"))


def check(name: str, shape: Shape, dtype: torch.dtype, device: str) -> float:
    """Hold a routed peer against the definition, without dropout, whose masks differ, and on two samples at most.

    Returns:
        The largest error of the output and the gradients, each relative to its tensor's norm.

    Raises:
        AssertionError: it is another operator.
    """
    shape = replace(shape, batch=min(shape.batch, 2), dropout=0.0)
    layer, want = _definition(shape, dtype, device)
    got = gradients(layer, ROUTED[name](layer))
    bound = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}[dtype]
    worst = 0.0
    for what, mine, wide in zip(("out", "dx", "dA", "dB"), got, want, strict=False):
        error = ((mine.double() - wide).norm() / wide.norm()).item()
        assert error <= bound, f"{name} on {shape}: {what} is off by {error:.1e} of its norm, at most {bound:.0e}"
        worst = max(worst, error)
    return worst


def doc(name: str) -> str:
    """What a peer is, in a sentence."""
    return " ".join((inspect.getdoc(PEERS[name]) or "").split())
