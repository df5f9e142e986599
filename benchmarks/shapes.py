"""The layers that the benchmarks time: one table for all of them.

``paper`` are the layers of the published experiments (GPT-2 with a merged q and v, RoBERTa; a condition of one pooled
token or of a ViT's 197), ``llava`` those of a vision-language model of 7 or 8 billion parameters beside an image of
576 tokens, ``decode`` one token a sequence with a condition that was encoded before. Each has a smaller version for a
CPU of two cores: fewer samples, and for llava half the width; what makes the shape what it is (tokens a sample,
condition tokens, rank, route, dropout) stays. Two sweeps beside the table change one number at a time.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from routed_peft.routes import ROUTES, resolve_pool

MERGED = ((0, 1), (2, 3))  # q and v of a merged qkv, in units of the width


@dataclass(frozen=True)
class Shape:
    """A frozen linear layer with its update: input [batch, n, d], condition [batch, m, d] projected by the same A.

    Attributes:
        name: how results call it.
        family: "paper", "llava" or "decode".
        out: columns of the output.
        r: rank of each slice.
        merged: the output is a fused qkv whose q and v are adapted and routed together, so that R = 2 r.
        cached: the condition was encoded before, and nothing gets a gradient.
        aims: how much faster than eager a layer is to be on an H200, forward and backward (0: no aim).
    """

    name: str
    family: str
    batch: int
    n: int
    d: int
    out: int
    r: int
    routing: str
    m: int = 1
    merged: bool = False
    dropout: float = 0.0
    cached: bool = False
    aims: tuple[float, float] = (0.0, 0.0)

    @property
    def tokens(self) -> int:
        return self.batch * self.n

    @property
    def slices(self) -> list[tuple[int, int]] | None:
        """The adapted columns, as ``out_slices``; None for all of them."""
        return [(a * self.d, b * self.d) for a, b in MERGED] if self.merged else None

    @property
    def width(self) -> int:
        """R."""
        return self.r * (len(MERGED) if self.merged else 1)

    @property
    def adapted(self) -> int:
        """Columns of the output that the update reaches."""
        return sum(stop - start for start, stop in self.slices) if self.slices else self.out

    @property
    def pooled(self) -> bool:
        """Whether the route sees one row a condition."""
        return self.m == 1 or resolve_pool(self.routing, "auto") != "none"

    @property
    def rank_one(self) -> bool:
        """Whether the update is one number a token times one row a condition."""
        return self.routing == "expand" or (self.routing == "gram" and self.m == 1)

    def __str__(self):
        parts = [f"{self.routing}, {self.tokens:,} tokens, {self.d} to {self.out}, R={self.width}"]
        parts += [f"M={self.m}"] if self.m > 1 else []
        parts += [f"dropout {self.dropout}"] if self.dropout else []
        parts += ["condition cached"] if self.cached else []
        return ", ".join(parts)


def _paper(name: str, batch: int, n: int, r: int, routing: str, d: int = 768, **more) -> Shape:
    out = 3 * d if more.get("merged", True) else d
    return Shape(name, "paper", batch, n, d, out, r, routing, **{"merged": True, **more})


def _llava(name: str, out: int, r: int, routing: str, batch: int = 8, **more) -> Shape:
    return Shape(name, "llava", batch, 1024, 4096, out, r, routing, m=576, aims=(1.22, 1.18), **more)


def _decode(name: str, batch: int, out: int, r: int, routing: str) -> Shape:
    return Shape(name, "decode", batch, 1, 4096, out, r, routing, m=576, cached=True, aims=(1.6, 0.0))


# The shape at full size, and how many samples its small version has.
_TABLE = [
    (_paper("gpt2-add", 40, 20, 128, "add", aims=(1.6, 1.4)), 40),
    (_paper("gpt2-mul", 16, 50, 64, "mul", dropout=0.1, aims=(1.6, 1.4)), 16),
    (_paper("gpt2-expand", 40, 50, 64, "expand", dropout=0.1, aims=(1.6, 1.4)), 40),
    (_paper("gpt2-gram", 40, 32, 64, "gram", m=197, aims=(1.6, 1.4)), 40),
    (_paper("roberta-mul", 512, 20, 64, "mul", merged=False, dropout=0.1, aims=(1.6, 1.5)), 104),
    (_paper("roberta-gram", 512, 32, 64, "gram", m=197, merged=False), 64),
    (_paper("gpt2-long-mul", 512, 50, 128, "mul", dropout=0.1, aims=(1.6, 1.5)), 48),
    (_paper("gpt2-long-expand", 512, 50, 128, "expand", dropout=0.1, aims=(2.1, 2.2)), 48),
    (_paper("gpt2-long-gram", 512, 50, 128, "gram", aims=(2.1, 2.2)), 48),
    (_paper("gpt2-medium-mul", 512, 32, 64, "mul", d=1024, aims=(1.6, 1.5)), 64),
    (_llava("llava-gram", 4096, 16, "gram"), 2),
    (_llava("llava-gram-dropout", 4096, 64, "gram", dropout=0.1), 2),
    (_llava("llava-gram-wide", 4096, 128, "gram", dropout=0.1, batch=16), 2),
    (_llava("llava-mul", 4096, 64, "mul", dropout=0.1), 2),
    (_llava("llava-up-mul", 11008, 64, "mul", dropout=0.1), 2),
    (_llava("llama3-up-mul", 14336, 16, "mul"), 2),
    (_decode("decode-1-gram", 1, 4096, 16, "gram"), 1),
    (_decode("decode-8-gram", 8, 4096, 64, "gram"), 8),
    (_decode("decode-64-mul", 64, 4096, 64, "mul"), 64),
    (_decode("decode-64-up-gram", 64, 11008, 64, "gram"), 64),
]


def _small(shape: Shape, batch: int) -> Shape:
    """Its version for a CPU; the aims are a GPU's."""
    half = 2 if shape.family == "llava" else 1
    return replace(shape, batch=batch, d=shape.d // half, out=shape.out // half, aims=(0.0, 0.0))


FULL = {shape.name: shape for shape, _ in _TABLE}
SMALL = {shape.name: _small(shape, batch) for shape, batch in _TABLE}
assert all(shape.routing in ROUTES for shape in FULL.values())
TABLES = {"small": SMALL, "full": FULL}
_WIDTHS = {"small": 768, "full": 4096}


def _tokens(tokens: int, d: int) -> Shape:
    return Shape(f"sweep-tokens-{tokens}", "sweep tokens", tokens // 128, 128, d, d, 16, "gram", m=64)


def _m(m: int, d: int) -> Shape:
    return Shape(f"sweep-m-{m}", "sweep M", 8, 128, d, d, 16, "gram", m=m)


# By size: gram of rank 16, whose tokens grow at 64 tokens a condition, and whose condition grows at 1,024 tokens.
SWEEP_TOKENS = {size: [_tokens(t, d) for t in (128, 256, 512, 1024, 2048, 4096)] for size, d in _WIDTHS.items()}
SWEEP_M = {size: [_m(m, d) for m in (1, 4, 16, 64, 256, 1024)] for size, d in _WIDTHS.items()}
