"""How far float32 is off, ours and eager PyTorch's: ``python benchmarks/accuracy.py`` prints a table for CONTRIBUTING.

A plain LoRA's update x Aᵀ Bᵀ and its gradients, of standard normal numbers, against float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from routed_peft import functional

SHAPES = ((1024, 768, 64), (2048, 2048, 128), (1024, 8192, 128))  # rows, width, rank
NAMES = ("out", "dx", "dA", "dB")


def everything(update, tensors: list[Tensor], weights: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """The output and the gradients of all tensors, computed in ``dtype``."""
    leaves = [t.to(dtype).requires_grad_() for t in tensors]
    out = update(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, weights.to(dtype))]


def errors(rows: int, width: int, rank: int) -> list[tuple[float, float]]:
    """Our relative error and eager's, for each of NAMES."""
    torch.manual_seed(0)
    tensors = [torch.randn(1, rows, width), torch.randn(rank, width), torch.randn(width, rank)]
    weights = torch.randn(1, rows, width)

    def eager(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return (x @ a.mT) @ b.mT

    def ours(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return functional.routed_lora(x, a, None, b, routing="none", scaling=1.0)

    want = everything(eager, tensors, weights, torch.float64)
    found = [everything(update, tensors, weights, torch.float32) for update in (ours, eager)]
    return [
        tuple(((side[i].double() - exact).norm() / exact.norm()).item() for side in found)
        for i, exact in enumerate(want)
    ]


if __name__ == "__main__":
    print("| rows, width, rank | " + " | ".join(NAMES) + " |")
    print("|---" * (len(NAMES) + 1) + "|")
    for shape in SHAPES:
        cells = [f"{ours:.1e} (eager {eager:.1e})" for ours, eager in errors(*shape)]
        print(f"| {shape[0]:,}, {shape[1]:,}, {shape[2]} | " + " | ".join(cells) + " |")
