"""The backward ops of a device that has no kernels for them: the definition, recomputed from the inputs.

The same seed draws the same dropout masks, so the gradient is that of the forward that ran. What a forward can save is
not needed here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import reference
from .reference import Options
from .routes import ACTIVATIONS, POOLS, ROUTES, SCALES, SOURCES

_TENSORS = 15  # of a backward's arguments, before its numbers


def _name(codes: dict[str, int], code: int) -> str:
    return next(name for name, each in codes.items() if each == code)


def _options(
    samples: int, routing: int, source: int, pool: int, scale: int, groups: int, slices: Sequence[int],
    out_features: int, scaling: float, dropout: float, condition_dropout: float, activation: int, residual: bool,
) -> Options:  # fmt: skip
    return Options(
        samples, _name({name: route.code for name, route in ROUTES.items()}, routing), _name(SOURCES, source),
        _name(POOLS, pool), _name(SCALES, scale), groups, tuple(slices), out_features, scaling, dropout,
        condition_dropout, _name(ACTIVATIONS, activation), residual,
    )  # fmt: skip


def _gradients(
    function: Callable[..., Tensor], x: Tensor, tensors: Sequence[Tensor | None], needs: int, gradient: Tensor
) -> tuple[Tensor, ...]:
    """Of ``function(x, *tensors)``: contiguous where a bit of ``needs`` asks for one, elsewhere an empty tensor."""
    tensors = (x, *tensors)
    wanted = [i for i, t in enumerate(tensors) if needs >> i & 1 and t is not None]
    found: dict[int, Tensor] = {}
    if wanted:

        def of_wanted(*values: Tensor) -> Tensor:
            given = dict(zip(wanted, values, strict=True))
            return function(*(given.get(i, t) for i, t in enumerate(tensors)))

        # torch.func differentiates where the dispatcher has left autograd behind, as it has inside an op
        pull = torch.func.vjp(of_wanted, *(tensors[i] for i in wanted))[1]
        with reference.no_autocast(x.device):  # the caller's is on in a backward that it asks for inside of it
            found = dict(zip(wanted, pull(gradient), strict=True))
    return tuple(found[i].contiguous() if i in found else x.new_empty([0]) for i in range(len(tensors)))


def backward(needs: int, dout: Tensor, T: Tensor, state: Tensor, kept: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    """``routed_peft::backward``."""
    options = _options(*inputs[_TENSORS:])
    constant = list(inputs[9:_TENSORS])
    condition, index, offsets = inputs[3], constant[1], constant[4]
    if condition is not None and index is not None:
        # One that points nowhere has made NaN of its rows already; here it would be an error the device keeps.
        conditions = condition.shape[0] if offsets is None else offsets.shape[0] - 1
        constant[1] = index.clamp(0, conditions - 1)

    def function(*tensors: Tensor | None) -> Tensor:
        return reference.run((*tensors, *constant, None), options)

    return _gradients(function, inputs[0], inputs[1:9], needs, dout)


def encode_backward(
    needs: int, dstate: Tensor, kept: Tensor, y: Tensor, C: Tensor, b_C: Tensor | None, mask: Tensor | None,
    *numbers: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    """``routed_peft::encode_backward``."""
    routing, pool, scale, groups = numbers
    options = _options(y.shape[0], routing, SOURCES["tokens"], pool, scale, groups, (), 0, 1.0, 0.0, 0.0, 0, False)

    def function(y: Tensor, C: Tensor, b_C: Tensor | None) -> Tensor:
        return reference.run_encode(y, C, b_C, mask, options)

    return _gradients(function, y, (C, b_C), needs, dstate)
