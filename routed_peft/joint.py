"""One product for the conditions of all layers.

In one call every layer projects the same condition: V_l = Y C_lᵀ. Layers that route alike are, as far as the condition
goes, output slices of one wide layer that route on their own; so Y [C_1; C_2; ...]ᵀ is computed once, by the op that
encodes one layer's condition, and each layer is handed its part of the state. Y is read once instead of once for each
layer, forward and backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import functional
from .delivery import Delivered
from .errors import UnsupportedError
from .modules import RoutedLayer
from .routes import ROUTES
from .state import ConditionState, versions_of


class JointLayers:
    """The routed layers in ``module``, whose conditions are to be projected together."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._layers: list[RoutedLayer] | None = None

    def begin(self, value: Delivered) -> Delivered:
        """``value``, at the start of the call that it is delivered to, with the joint product to be."""
        if not isinstance(value.condition, Tensor) or torch.compiler.is_compiling():
            return value
        if torch.is_grad_enabled():
            _refuse_sharding(self.module)
        if self._layers is None:
            self._layers = [module for module in self.module.modules() if isinstance(module, RoutedLayer)]
        return value._replace(joint=Joint(self._layers, value.condition, value.mask))


class Part(NamedTuple):
    """What one product gave: the states of layers that compute in ``dtype``, beside one another in ``tensor``.

    ``places`` has the first and the number of a layer's columns, which are dimension ``dim``. ``shared``: the layers
    project the condition with the matrix that their inputs go through too.
    """

    tensor: Tensor
    dtype: torch.dtype
    places: dict[RoutedLayer, tuple[int, int]]
    routing: str
    dim: int
    shared: bool


class Handed:
    """The states in ``parts``, and nothing that is not in them: a checkpointed segment's, which shall encode none."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self._held = parts
        self._states: dict[tuple[RoutedLayer, torch.dtype], ConditionState] = {}

    def state_of(self, layer: RoutedLayer, dtype: torch.dtype) -> ConditionState | None:
        """The state for ``layer`` computing in ``dtype``; None if it has to encode the condition by itself."""
        key = layer, dtype
        for part in self._held if key not in self._states else ():
            if part.dtype == dtype and layer in part.places:  # made when asked for: a segment has few of the layers
                piece = part.tensor.narrow(part.dim, *part.places[layer])
                self._states[key] = ConditionState(part.routing, piece, versions_of(*layer._projection()[:2]))
        return self._states.get(key)

    def parts(self, dtype: torch.dtype) -> Sequence[Part]:
        """The products, for layers that compute in ``dtype``."""
        return [part for part in self._held if part.dtype == dtype]

    def handed(self, parts: Sequence[Part], tensors: Sequence[Tensor]) -> Handed:
        """The states in ``parts``, made of the tensors that a checkpointed segment was given in place of their own."""
        return Handed([part._replace(tensor=tensor) for part, tensor in zip(parts, tensors, strict=True)])


class Joint(Handed):
    """The states of one call's condition y [B, M, d_c] or [B, d_c], mask [B, M], for ``layers``.

    Nothing is computed before it is asked for. It belongs to one call: to its autograd graph and parameter values.
    """

    def __init__(self, layers: Sequence[RoutedLayer], y: Tensor, mask: Tensor | None) -> None:
        super().__init__([])
        self._layers, self._known, self._y, self._mask = layers, set(layers), y, mask
        # by dtype, and by whether gradients are recorded: what is made without would lose them
        self._made: dict[tuple[torch.dtype, bool], Handed] = {}

    def state_of(self, layer: RoutedLayer, dtype: torch.dtype) -> ConditionState | None:
        """As :class:`Handed`, made for all layers when the first one asks."""
        if layer not in self._known:
            return None  # a replica's, say
        return self._make(dtype).state_of(layer, dtype)

    def parts(self, dtype: torch.dtype) -> Sequence[Part]:
        """As :class:`Handed`."""
        return self._make(dtype).parts(dtype)

    def _make(self, dtype: torch.dtype) -> Handed:
        key = dtype, torch.is_grad_enabled()
        if key not in self._made:
            alike: dict[Any, list[RoutedLayer]] = {}
            for layer in self._layers:
                kind = _kind(layer, self._y)
                if kind is not None:
                    alike.setdefault(kind, []).append(layer)
            several = [layers for layers in alike.values() if len(layers) > 1]
            self._made[key] = Handed([self._product(layers, dtype) for layers in several])
        return self._made[key]

    def _product(self, layers: list[RoutedLayer], dtype: torch.dtype) -> Part:
        matrices, biases, groups = zip(*(layer._projection() for layer in layers), strict=True)
        first = layers[0]
        state = functional.encode_condition(
            self._y.to(dtype), torch.cat(matrices), routing=first.routing, mask=self._mask, pool=first.condition_pool,
            scale=first.condition_scale, b_C=None if biases[0] is None else torch.cat(biases), groups=sum(groups),
            # one product by the vendor's library there: the kernels take few slices
            backend="reference" if self._y.device.type == "cuda" else first.backend, name=first.label,
        )  # fmt: skip
        by_token = state.tensor.dim() == 3 and ROUTES[first.routing].state == "tokens"
        places, column = {}, 0
        for layer, matrix in zip(layers, matrices, strict=True):
            places[layer] = column, matrix.shape[0]
            column += matrix.shape[0]
        return Part(state.tensor, dtype, places, first.routing, 2 if by_token else 1, first.shares_projection())


def _kind(layer: RoutedLayer, y: Tensor) -> Any:
    """What layers have to agree in to be encoded together; None for one that has to encode y by itself."""
    if layer.routing == "none" or layer.condition_source != "external" or layer.condition_p():
        return None  # dropout draws each layer its own mask of y
    if not y.is_floating_point():
        return None  # for the layer to refuse
    matrix, bias, groups = layer._projection()
    if layer.computes_projection():
        return None  # for which no state can be told to be the layer's
    plain = all(t is None or (type(t) in (nn.Parameter, Tensor) and t.device == y.device) for t in (matrix, bias))
    if not plain or matrix.dim() != 2 or y.dim() not in (2, 3) or matrix.shape[1] != y.shape[-1]:
        return None  # sharded, offloaded, or an error for the layer to tell
    return (
        layer.routing, layer.condition_pool, layer.condition_scale, layer.backend, matrix.dtype, matrix.shape[1],
        matrix.shape[0] // groups, bias is None, layer.shares_projection(),
    )  # fmt: skip


def _refuse_sharding(module: nn.Module) -> None:
    """Sharded parameters are whole only while their own part runs; the joint product needs all of them, twice."""
    for part in module.modules():
        if {"FSDPModule", "FullyShardedDataParallel"} & {kind.__name__ for kind in type(part).__mro__}:
            raise UnsupportedError(
                f"join_conditions cannot train a model whose parameters are sharded ({type(part).__name__}): attach "
                "without it"
            )
