"""What a call costs the host at sizes where arithmetic costs nothing, beside the same in plain torch, on one thread.

pytest benchmarks/bench_overhead.py --benchmark-only
"""

import functools

import measure
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import routed_peft as rp
from routed_peft import functional

N, D, R, OUT, M, SCALING = 4, 8, 4, 8, 3, 0.5
ROUNDS = 100
PLAYER = measure.Recorded()


class Tensors:
    """A layer's, random; x, A and B get gradients, and A projects the condition too."""

    def __init__(self):
        g = torch.Generator().manual_seed(0)

        def random(*shape):
            return torch.randn(*shape, generator=g)

        self.x = random(1, N, D).requires_grad_()
        self.A, self.B = (random(*s).div_(s[1] ** 0.5).requires_grad_() for s in ((R, D), (OUT, R)))
        self.y, self.W, self.bias, self.dout = random(1, M, D), random(OUT, D), random(OUT), random(1, N, OUT)


def update(x, A, y, B, routing):
    h, v = F.linear(x, A), F.linear(y, A)
    if routing == "gram":
        z = h @ v.mT @ v / M
    else:
        v = v.mean(1, keepdim=True)
        z = h * v if routing == "mul" else h.sum(-1, keepdim=True) * v
    return F.linear(z, B) * SCALING


class Eager(nn.Module):
    """RoutedLoRA as one writes it in torch."""

    def __init__(self, base, A, B, routing):
        super().__init__()
        self.base, self.A, self.B, self.routing = base, nn.Parameter(A), nn.Parameter(B), routing

    def forward(self, x, y):
        return self.base(x) + update(x, self.A, y, self.B, self.routing)


def both(form, routing, t):
    """Ours and torch's call, and the parameters of each."""
    if form == "function":
        ours = lambda: functional.routed_linear(t.x, t.W, t.bias, t.y, t.A, t.B, routing=routing, scaling=SCALING)  # noqa: E731
        torchs = lambda: F.linear(t.x, t.W, t.bias) + update(t.x, t.A, t.y, t.B, routing)  # noqa: E731
        return {"routed_peft": (ours, (t.A, t.B)), "torch": (torchs, (t.A, t.B))}
    base = nn.Linear(D, OUT).requires_grad_(False)
    with torch.no_grad():
        base.weight.copy_(t.W)
        base.bias.copy_(t.bias)
    layer = rp.RoutedLoRA(base, r=R, lora_alpha=SCALING * R, routing=routing)
    with torch.no_grad():
        layer.A.copy_(t.A)
        layer.B.copy_(t.B)
    eager = Eager(base, t.A.detach().clone(), t.B.detach().clone(), routing)
    return {
        "routed_peft": (lambda: layer(t.x, t.y), (layer.A, layer.B)),
        "torch": (lambda: eager(t.x, t.y), (eager.A, eager.B)),
    }


def steps(way, call, parameters, t):
    if way == "no_grad":
        return torch.no_grad()(call)
    return call if way == "forward" else lambda: torch.autograd.grad(call(), (t.x, *parameters), t.dout)


@functools.lru_cache(maxsize=1)  # the peers of a group follow each other
def measured(form, routing, way):
    """By peer the seconds of a call."""
    t = Tensors()
    sides = both(form, routing, t)
    results = [torch.autograd.grad(call(), (t.x, *parameters), t.dout) for call, parameters in sides.values()]
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(*(call() for call, _ in sides.values()), rtol=1e-5, atol=1e-5)
    calls = {peer: steps(way, *side, t) for peer, side in sides.items()}
    samples = {peer: measure.wall(lambda i, call=call: call(), "cpu") for peer, call in calls.items()}
    return measure.interleaved(samples, ROUNDS, seconds=5)


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def pytest_generate_tests(metafunc):
    wanted = metafunc.config.getoption("--peers", None)
    sides = {"routed_peft": "routed_peft", "torch": "eager"}
    metafunc.parametrize("peer", [side for side, peer in sides.items() if wanted is None or peer in wanted])


@pytest.mark.benchmark(timer=PLAYER.now)
@pytest.mark.parametrize("way", ["no_grad", "forward", "step"])
@pytest.mark.parametrize("routing", ["gram", "mul", "expand"])
@pytest.mark.parametrize("form", ["function", "layer"])
def test_overhead(benchmark, one_thread, form, routing, way, peer):
    times = measured(form, routing, way)[peer]
    benchmark.group = f"{form}, {routing}, {way}"
    benchmark.extra_info.update(
        kind="overhead", form=form, way=way, peer=peer, routing=routing, dtype="float32", device="cpu"
    )
    PLAYER.load(times)
    benchmark.pedantic(PLAYER.play, rounds=len(times), iterations=1)
