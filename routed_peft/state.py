"""ConditionState: a condition as one layer sees it, encoded once and used many times."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook
from torch.utils import _pytree as pytree

from .errors import StaleStateError

# Parameters, each with its version: the counter (None of an inference tensor, which has none) and what the Python
# object stands for, which torch.utils.swap_tensors exchanges. The parameters themselves: another one might get the
# memory, and so the id, of one that is gone.
Version = tuple[int | None, int]
Versions = tuple[tuple[Tensor | None, Version], ...]


@dataclass(frozen=True, eq=False)
class ConditionState:
    """The condition state of one routed layer: all that its forward needs to know of the condition.

    Attributes:
        routing: the route it was encoded for.
        tensor: float32 (float64 for float64 inputs). v [B, R] for a pooled condition or one of a single token; for
            gram S = VᵀV and for gram_relu K = relu(V)ᵀV, [B, R, R] (with unmixed output slices [B, R, w]: the slices'
            w×w matrices below one another); V [B, M, R] where the route works token by token.
        versions: the parameters it was made from, which it keeps alive, and their version counters.

    A differentiable pytree: gradients flow through ``tensor``. It belongs to one layer and to the parameter values of
    the moment; using it after they changed raises :class:`StaleStateError`. What torch itself does not count as a
    change goes unseen: assigning to ``parameter.data``, and everything inside a compiled graph.
    """

    routing: str
    tensor: Tensor
    versions: Versions = field(default=(), repr=False)

    def __copy__(self) -> ConditionState:
        return ConditionState(self.routing, self.tensor, self.versions)

    def __deepcopy__(self, memo: dict[int, Any]) -> ConditionState:
        """Of the tensor; it still is a state of the same parameters."""
        return ConditionState(self.routing, copy.deepcopy(self.tensor, memo), self.versions)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled, it is a state of parameters that no process has."""
        return ConditionState, (self.routing, self.tensor, tuple((None, version) for _, version in self.versions))

    def to(self, *args: Any, **kwargs: Any) -> ConditionState:
        """The state with its tensor moved, as ``Tensor.to``."""
        return ConditionState(self.routing, self.tensor.to(*args, **kwargs), self.versions)

    def index_select(self, rows: Tensor) -> ConditionState:
        """The states of the conditions ``rows`` (int64 [K]), for instance to reorder beams."""
        return ConditionState(self.routing, self.tensor.index_select(0, rows), self.versions)

    def check_fresh(self, name: str, *parameters: Tensor | None, own: bool = False) -> None:
        """Raise StaleStateError if one of ``parameters`` changed since this state was encoded with it, or if the state
        is to be their ``own`` and was encoded with others: it may well have the right shape."""
        if torch.compiler.is_compiling():
            return  # a version counter is no part of a traced graph, which would be guarded with every one
        if self.is_of(*parameters):
            return
        known = {id(p): version for p, version in _versions_now(parameters)}
        if own and any(id(p) not in known for p, _ in self.versions):
            raise StaleStateError(
                f"{name}: this ConditionState was encoded with other parameters than this layer's; encode it with "
                "this layer"
            )
        if any(known.get(id(p), version) != version for p, version in self.versions):
            raise StaleStateError(
                f"{name}: this ConditionState was encoded before the parameters changed; encode it again"
            )

    def is_of(self, *parameters: Tensor | None) -> bool:
        """Whether it was encoded with exactly these parameters, and they have not changed since."""
        versions, i = self.versions, 0
        for p in parameters:
            if p is None:
                continue
            if i == len(versions) or versions[i][0] is not p:
                return False
            if versions[i][1] != _version(p):
                return False
            i += 1
        return i == len(versions)


def versions_of(*parameters: Tensor | None) -> Versions:
    """Each tensor that is there, with its version counter, for a state that is made from them."""
    if torch.compiler.is_compiling():
        return ()
    if not _hooked:
        _hooked.append(register_optimizer_step_post_hook(_count_step))
    return _versions_now(parameters)


def _version(p: Tensor) -> Version:
    return (None if p.is_inference() else p._version), p._cdata


def _versions_now(parameters: tuple[Tensor | None, ...]) -> Versions:
    return tuple([(p, _version(p)) for p in parameters if p is not None])


_hooked: list[Any] = []  # the hook's handle, once there is a state


def _count_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """Some optimizers write parameters without counting a version (torch's with fused=True, bitsandbytes'), so it is
    counted for all."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p.grad is not None:
                torch.autograd.graph.increment_version(p)


class _Versions(tuple[tuple[Tensor | None, Version], ...]):
    """Travels with a flattened state and is no part of its structure, so that an exported program takes every state."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Versions)

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return 0

    def __deepcopy__(self, memo: dict[int, Any]) -> _Versions:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return _Versions, ()


def _flatten(state: ConditionState) -> tuple[list[Any], Any]:
    return [state.tensor], (state.routing, _Versions(state.versions))


def _flatten_with_keys(state: ConditionState) -> tuple[list[Any], Any]:
    children, context = _flatten(state)
    return [(pytree.GetAttrKey("tensor"), children[0])], context


pytree.register_pytree_node(
    ConditionState,
    _flatten,
    lambda children, context: ConditionState(context[0], next(iter(children)), tuple(context[1])),
    serialized_type_name="routed_peft.ConditionState",
    to_dumpable_context=lambda context: context[0],  # an identity means nothing in another process
    from_dumpable_context=lambda routing: (routing, _Versions()),
    flatten_with_keys_fn=_flatten_with_keys,
)
