"""Whole training steps of a small transformer on the ops: forward, backward and AdamW, against the definition's."""

import copy

import pytest
import torch
import torch.nn.functional as F
from cases import Backend
from torch import nn

import routed_peft as rp
from routed_peft import functional

D, HEADS, DC, CLASSES, BATCH, N, M = 16, 2, 12, 5, 3, 6, 4


class Block(nn.Module):
    """Pre-norm attention and MLP, each projection with a route of its own, and an Adapter behind them."""

    def __init__(self, backend):
        super().__init__()

        def lora(inputs, outputs, routing, **options):
            options = dict(r=4, lora_dropout=0.1, condition_features=DC, backend=backend) | options
            layer = rp.RoutedLoRA.from_features(inputs, outputs, routing=routing, **options)
            nn.init.normal_(layer.lora_B, std=0.2)
            return layer

        self.first, self.second = nn.LayerNorm(D), nn.LayerNorm(D)
        slices = [(0, D), (2 * D, 3 * D)]
        self.qkv = lora(D, 3 * D, "gram", out_slices=slices)  # q and v
        self.out = lora(D, D, "mul")
        self.up = lora(D, 2 * D, "add")
        self.down = lora(2 * D, D, "expand")
        self.adapter = rp.RoutedAdapter(
            D, 4, routing="gram_relu", activation="gelu", dropout=0.1, condition_features=DC, backend=backend
        )
        nn.init.normal_(self.adapter.up, std=0.2)

    def forward(self, x, y):
        q, k, v = self.qkv(self.first(x), y).unflatten(-1, (3, HEADS, D // HEADS)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2), y)
        x = x + self.down(F.gelu(self.up(self.second(x), y)), y)
        return self.adapter(x, y)


class Transformer(nn.Module):
    def __init__(self, backend):
        super().__init__()
        self.blocks = nn.ModuleList([Block(backend)])
        self.head = nn.Linear(D, CLASSES)

    def forward(self, x, y):
        for block in self.blocks:
            x = block(x, y)
        return self.head(x.mean(1))


def train(backend, device, dtype, steps):
    """The loss of every step, and the parameters at the end."""
    torch.manual_seed(0)
    model = Transformer(backend).to(dtype)
    x, y, labels = torch.randn(8, BATCH, N, D), torch.randn(8, BATCH, M, DC), torch.randint(CLASSES, (8, BATCH))
    model, labels = model.to(device), labels.to(device)
    x, y = x.to(device, dtype), y.to(device, dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, eps=1e-4)
    losses = []
    for step in range(steps):
        torch.manual_seed(step)  # of the dropout
        loss = F.cross_entropy(model(x[step % 8], y[step % 8]), labels[step % 8])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses).cpu().double(), {k: v.detach().cpu().double() for k, v in model.named_parameters()}


def test_200_steps_are_the_references(native):
    """The same losses step by step: what rounding does to them, in float64 where there is one, and no more."""
    want, parameters = train("reference", native.device, native.dtype, 200)
    losses, found = train(native, native.device, native.dtype, 200)
    assert want[-16:].mean() < 0.2 * want[:16].mean(), "it learns"
    assert (losses - want).abs().max() < native.close
    for name, tensor in parameters.items():
        assert (found[name] - tensor).norm() < 2 * native.close * (1 + tensor.norm()), name


# ------------------------------------------------------------------------------------------------ in a graph
class Seeded(nn.Module):
    """Two layers, one of them onto a frozen base, whose dropout a seed tensor determines; and an Adapter."""

    def __init__(self, backend):
        super().__init__()
        self.backend = backend
        self.W, self.bias = (nn.Parameter(torch.randn(*shape) / 4, requires_grad=False) for shape in ((D, D), (D,)))
        self.A, self.B, self.C = (nn.Parameter(torch.randn(*shape) / 4) for shape in ((4, D), (D, 4), (4, DC)))
        self.A2, self.B2, self.C2 = (nn.Parameter(torch.randn(*shape) / 4) for shape in ((4, D), (D, 4), (4, DC)))
        self.down, self.up, self.b_down, self.b_up = (
            nn.Parameter(torch.randn(*shape) / 4) for shape in ((4, D), (D, 4), (4,), (D,))
        )

    def forward(self, x, y, seed):
        options = dict(dropout_p=0.2, backend=self.backend)
        x = functional.routed_linear(
            x, self.W, self.bias, y, self.A, self.B, self.C, routing="gram", scaling=1.0, seed=seed, **options
        )
        x = x + functional.routed_lora(
            x, self.A2, y, self.B2, self.C2, routing="mul", scaling=1.0, seed=seed + 1, **options
        )
        return functional.routed_adapter(
            x, None, self.down, self.b_down, self.up, self.b_up, routing="none", seed=seed + 2, **options
        )


@pytest.mark.cuda
def test_a_captured_step_draws_new_masks_from_a_new_seed():
    """Forward, backward and AdamW as one CUDA graph, against the same steps run one by one."""
    Backend("cuda").ready()
    model = Seeded("cuda").to("cuda")
    x, y = torch.randn(24, BATCH, N, D, device="cuda"), torch.randn(24, BATCH, M, DC, device="cuda")

    def stepper(model, x, y, seed):
        optimizer = torch.optim.AdamW(
            [p for p in model.parameters() if p.requires_grad], lr=1e-2, eps=1e-4, capturable=True
        )

        def step():
            optimizer.zero_grad(set_to_none=True)
            loss = model(x, y, seed).square().mean()
            loss.backward()
            optimizer.step()
            return loss.detach()

        return step

    def one_after_the_other(seeds):
        """The losses of the steps run one by one."""
        inputs = [x[0].clone(), y[0].clone(), torch.zeros(1, dtype=torch.int64, device="cuda")]
        step, losses = stepper(copy.deepcopy(model), *inputs), []
        for i, seed in enumerate(seeds):
            refill(inputs, i, seed)
            losses.append(step().clone())
        return torch.stack(losses)

    def refill(inputs, i, seed):
        inputs[0].copy_(x[i])
        inputs[1].copy_(y[i])
        inputs[2].fill_(seed)

    seeds, warm = [7 + 1000 * i for i in range(24)], 4
    want = one_after_the_other(seeds)
    assert not torch.allclose(want, one_after_the_other([7] * 24), rtol=1e-3), "the seed matters"

    inputs = [x[0].clone(), y[0].clone(), torch.zeros(1, dtype=torch.int64, device="cuda")]
    step, losses = stepper(copy.deepcopy(model), *inputs), []
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for i in range(warm):
            refill(inputs, i, seeds[i])
            losses.append(step().clone())
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()
    for i in range(warm, 24):
        refill(inputs, i, seeds[i])
        graph.replay()
        losses.append(loss.clone())
    torch.testing.assert_close(torch.stack(losses), want, rtol=1e-4, atol=1e-5)
