"""One description of a routed call, and how to run it on any backend: what the operator's tests are written in."""

import os
from dataclasses import dataclass

import emulated
import pytest
import torch

from routed_peft import build_info, functional
from routed_peft.routes import ROUTES

ROUTED = [name for name in ROUTES if name not in ("none", "gram_reshape")]
EVERY = ["none", *ROUTED]
OUT, SLICES = 10, [(0, 3), (6, 10)]


class Backend(str):
    """Who computes, with what its tests have to know. On "emulated" and "cuda" the forward is the CUDA kernels."""

    @property
    def kernels(self):
        return self in ("emulated", "cuda")

    @property
    def device(self):
        return "cuda" if self == "cuda" else "cpu"

    @property
    def dtype(self):
        """The one that shows errors best."""
        return torch.float32 if self.kernels else torch.float64

    @property
    def close(self):
        """How near two ways of computing the same thing must come in it, as ``worst`` measures."""
        return 2e-5 if self.kernels else 1e-11

    def ready(self):
        """Self, where this machine can; otherwise the test is skipped."""
        if self == "emulated":
            emulated.load()
        if self == "cuda":
            why = None if build_info()["cuda"] else "the extension was built without CUDA"
            why = why if torch.cuda.is_available() else "torch finds no GPU"
            if why and os.environ.get("ROUTED_PEFT_REQUIRE_CUDA") == "1":
                pytest.fail(f"ROUTED_PEFT_REQUIRE_CUDA=1, and {why}")
            if why:
                pytest.skip(f"cuda: {why}")
        return self

    def take(self, tensors):
        """A dict of tensors where this backend computes."""
        return {k: v.to(self.device) for k, v in tensors.items()}


@dataclass
class Case:
    """A call with random tensors. ``form``: "lora", "linear", "adapter", "base" (a foreign layer's output) or "state"
    (encode, then lora)."""

    routing: str
    form: str = "linear"
    batch: int = 2
    n: int = 5
    m: int = 4
    d: int = 6
    r: int = 3
    out: int = OUT
    d_c: int | None = None  # None: C is A
    pool: str = "auto"
    scale: str = "tokens"
    slices: bool = False
    across: bool = False
    activation: str = "gelu"
    masked: bool = False
    index: tuple[int, ...] | None = None
    in_sequence: bool = False
    dropout: float = 0.0
    varlen: bool = False
    dtype: torch.dtype = torch.float64
    parameter_dtype: torch.dtype | None = None

    def __str__(self):
        changed = [f"{k}={v}" for k, v in vars(self).items() if v != getattr(type(self), k, None) and k != "routing"]
        return "-".join([self.routing, *changed])

    @property
    def width(self):
        """R."""
        return self.r * (len(SLICES) if self.slices else 1)

    def tensors(self, seed=0):
        """The differentiable tensors by name, and the constant ones."""
        g = torch.Generator().manual_seed(seed)

        def random(*shape, scale=1.0):
            return (torch.randn(*shape, generator=g, dtype=torch.float64) * scale).to(self.dtype)

        b, n, m, d, out = self.batch, self.n, self.m, self.d, self.d if self.form == "adapter" else self.out
        selected = sum(stop - start for start, stop in SLICES) if self.slices else out
        conditions = b if self.index is None else max(self.index) + 1
        t = {"x": random(*((b * n,) if self.varlen else (b, n)), d)}
        t["A"], t["B"] = random(self.width, d, scale=d**-0.5), random(selected, self.r, scale=self.r**-0.5)
        if self.form == "linear":
            t["W"], t["bias"] = random(out, d, scale=d**-0.5), random(out)
        if self.form == "adapter":
            t["b_down"], t["b_up"] = random(self.width, scale=0.3), random(out)
        if self.form == "base":
            t["base"] = random(*t["x"].shape[:-1], out)
        if self.routing != "none" and not self.in_sequence:
            d_c = d if self.d_c is None else self.d_c
            t["y"] = random(*((conditions * m,) if self.varlen else (conditions, m)), d_c)
            if self.d_c is not None:
                t["C"] = random(self.width, d_c, scale=d_c**-0.5)
                if self.form == "adapter":
                    t["b_C"] = random(self.width, scale=0.3)
        if self.parameter_dtype is not None:
            t = {k: v if k in ("x", "y", "W", "base") else v.to(self.parameter_dtype) for k, v in t.items()}

        constant = {}
        if self.masked or self.in_sequence:
            shape = (b, n) if self.in_sequence else (conditions, m)
            mask = torch.rand(shape, generator=g) > 0.4
            if shape[0] > 1:
                mask[0] = False  # a sample without any valid condition token
            constant["mask"] = mask.flatten() if self.varlen else mask
        if self.masked and not self.varlen:
            constant["input_mask"] = torch.rand(b, n, generator=g) > 0.3
        if self.index is not None:
            constant["index"] = torch.tensor(self.index)
        if self.varlen:  # samples of uneven length, one of them empty
            for name, each in (("cu_seqlens", n), ("condition_cu_seqlens", m)):
                bounds = [0, each // 2, *(each * i for i in range(2, b)), b * each]
                constant[name] = torch.tensor(bounds)
            if self.pool == "none" and ROUTES[self.routing].state == "tokens":
                constant["condition_cu_seqlens"] = constant["cu_seqlens"]
            if self.in_sequence or self.routing == "none":
                del constant["condition_cu_seqlens"]
        return t, constant

    def run(self, t, constant, backend, seed=5):
        """The output [.., o] for the tensors ``t``: computed where ``backend`` computes, returned on the CPU."""
        backend = Backend(backend)
        out = self._call(backend.take(t), backend.take(constant), backend, torch.tensor([seed], device=backend.device))
        return out.cpu()

    def _call(self, t, constant, backend, seed):
        options = dict(routing=self.routing, pool=self.pool, scale=self.scale, backend=backend, **constant)
        options |= dict(dropout_p=self.dropout, seed=seed)
        y, c = t.get("y"), t.get("C")
        if self.form == "adapter":
            options |= dict(activation=self.activation, residual=True)
            return functional.routed_adapter(
                t["x"], y, t["A"], t["b_down"], t["B"], t["b_up"], c, t.get("b_C"), **options
            )
        options |= dict(scaling=0.7, out_slices=SLICES if self.slices else None, route_across_slices=self.across)
        if self.form == "linear":
            return functional.routed_linear(t["x"], t["W"], t["bias"], y, t["A"], t["B"], c, **options)
        options["out_features"] = self.out
        if self.form == "base":
            return functional.apply("routed_lora", t["x"], t["A"], y, t["B"], c, base=t["base"], **options)
        if self.form == "state":
            y = functional.encode_condition(
                y, t["A"] if c is None else c, routing=self.routing, mask=options.pop("mask", None), pool=self.pool,
                scale=self.scale, groups=1 if self.across or not self.slices else len(SLICES), backend=backend,
            )  # fmt: skip
        return functional.routed_lora(t["x"], t["A"], y, t["B"], c, **options)

    def exact(self, t, constant, seed=5):
        """The definition in float64 of the tensors as they are rounded."""
        with torch.no_grad():
            return self.run({k: v.double() for k, v in t.items()}, constant, "reference", seed)

    def gradients(self, backend, seed=0, dtype=None, frozen=()):
        """The output and the gradient of a random weighting of it, by name; in ``dtype`` if given. None for what is
        ``frozen``."""
        t, constant = self.tensors(seed)
        t = {k: v.to(dtype or v.dtype).requires_grad_(k not in frozen) for k, v in t.items()}
        out = self.run(t, constant, backend)
        weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
        (out * weights.to(self.dtype).to(out.dtype)).sum().backward()
        return {"out": out.detach(), **{k: v.grad for k, v in t.items()}}


def worst(a, b):
    """The largest difference of two tensors, relative to the largest entry (and to 1)."""
    if a.numel() == 0:
        return 0.0
    return ((a - b).abs().max() / (1 + b.abs().max())).item()
