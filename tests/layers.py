"""Small layers and their inputs, and what the tests of registration and gradients compare."""

import torch
from tiny_models import awaken
from torch import nn

import routed_peft as rp
from routed_peft.routes import ROUTES

NAMES = [name for name in ROUTES if name != "gram_reshape"]  # the reference backend's alone
B, N, M, D, DC, OUT, R = 2, 5, 3, 16, 12, 24, 4


def lora(routing="gram", dtype=torch.float32, **options):
    base = nn.Linear(D, OUT, dtype=dtype)
    return awaken(rp.RoutedLoRA(base, r=R, routing=routing, condition_features=DC, **options))


def adapter(routing="gram", **options):
    return awaken(rp.RoutedAdapter(D, R, routing=routing, condition_features=DC, **options))


def inputs(n=N, m=M, grad=True, dtype=torch.float32):
    return torch.randn(B, n, D, dtype=dtype, requires_grad=grad), torch.randn(B, m, DC, dtype=dtype, requires_grad=grad)


def results(run, module, *wanted):
    """The output of ``run()``, and its gradients in ``wanted`` and in every parameter."""
    leaves = [*wanted, *module.parameters()]
    for leaf in leaves:
        leaf.grad = None
    out = run()
    (out * torch.linspace(-1, 1, out.numel()).reshape(out.shape).to(out.dtype)).sum().backward()
    return [out.detach(), *(leaf.grad for leaf in leaves)]


def assert_same(got, wanted, **tolerance):
    assert len(got) == len(wanted)
    for a, b in zip(got, wanted, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, **tolerance)


def linear_leaves(dtype=torch.float32):
    """x, A, B, y, C, W, bias."""
    shapes = ((B, N, D), (R, D), (OUT, R), (B, M, DC), (R, DC), (OUT, D), (OUT,))
    return [torch.randn(*shape, dtype=dtype) for shape in shapes]
