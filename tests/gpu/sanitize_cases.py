"""Small calls of every route, dtype and option on the GPU, forward and backward, for compute-sanitizer to watch
(tools/gpu_check.sh).

Sizes are odd so that every tile has an edge; the output and each gradient are held against the definition, for a call
that computes nothing would be clean too. The base weight is frozen: its gradient is the vendor's product, which a tool
that watches our kernels alone takes for memory that nobody wrote.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cases import EVERY, Case, worst  # noqa: E402

DTYPES = {torch.bfloat16: 3e-2, torch.float16: 1e-2, torch.float32: 1e-4}  # and how far a result may be off
SIZES = dict(n=37, d=72, r=5)


def cases() -> Iterator[Case]:
    for routing in EVERY:
        for dtype in DTYPES:
            yield Case(routing, "linear", m=9, slices=True, dropout=0.3, dtype=dtype, **SIZES)
            yield Case(routing, "adapter", m=9, masked=True, dtype=dtype, parameter_dtype=torch.float32, **SIZES)
            if routing != "none":
                yield Case(routing, "state", m=9, pool="mean", batch=3, index=(1, 0, 1), dtype=dtype, **SIZES)
                yield Case(routing, "lora", in_sequence=True, dtype=dtype, **SIZES)
                yield Case(routing, "lora", varlen=True, batch=3, d_c=24, dtype=dtype, **SIZES)
                yield Case(routing, "base", pool="none", m=37, d_c=24, dropout=0.3, dtype=dtype, **SIZES)
    for routing in ("none", "mul", "gram", "cross_gram"):
        for dtype in DTYPES:
            for r in (20, 50, 100, 200):  # the other padded widths, and a bottleneck of several blocks
                yield Case(routing, "linear", n=70, m=9, d=200, out=136, r=r, dtype=dtype)


def main() -> None:
    if not torch.cuda.is_available():
        raise SystemExit("no CUDA device")
    every, wrong = list(cases()), 0
    for case in every:
        want = case.gradients("reference", dtype=torch.float64, frozen=("W",))
        got = case.gradients("cuda", frozen=("W",))
        for name, exact in want.items():
            if exact is None:
                continue
            error = worst(got[name].double(), exact)
            if not error < DTYPES[case.dtype]:
                wrong += 1
                print(f"{case}: {name} is off by {error:.1e}")
    print(f"{len(every)} calls, {wrong} results wrong")
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
