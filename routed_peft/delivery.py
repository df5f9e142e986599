"""How a condition reaches the routed layers of a model: one slot per model, and who fills it.

Layers read only their slot. What a slot holds belongs to one thread. Gradient checkpointing runs a layer a second time,
during the backward pass: perhaps in another thread, and after the model has seen other conditions. So a checkpointed
segment takes the condition of its own forward along, as an argument of the checkpointed function (``BoundCheckpoint``),
and a layer that is recomputed without one raises instead of using whatever the slot holds by then.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .errors import MissingConditionError, RoutedPeftError
from .state import ConditionState


class Delivered(NamedTuple):
    """One call's condition, as the layers take it."""

    condition: Tensor | ConditionState | None
    mask: Tensor | None
    index: Tensor | None  # type: ignore[assignment]  # hides tuple.index, which nobody needs here
    input_mask: Tensor | None


class Slot:
    """Holds the condition of the running call, for each thread its own.

    Never part of a state dict; a deep copy or an unpickled slot is a new, empty one (shared by the copied layers).
    """

    def __init__(self) -> None:
        self._local = threading.local()

    def read(self, label: str) -> Delivered | None:
        """The condition of the running call, for the layer called ``label`` in errors; None if there is none.

        Raises:
            MissingConditionError: a backward pass is running and the slot was filled outside of it.
        """
        if not torch.compiler.is_compiling() and self.outlived():
            raise MissingConditionError(
                f"{label}: no condition during recomputation: checkpointing was enabled by a function routed_peft did "
                "not bind; pass the condition as an argument of the layer"
            )
        return self.value()

    def value(self) -> Delivered | None:
        """What this thread's slot holds."""
        return getattr(self._local, "value", None)

    def outlived(self) -> bool:
        """Whether a backward pass is running that the content of the slot (be it nothing) was not set in.

        A layer that runs then is being recomputed, and its forward may have had another condition.
        """
        task = torch._C._current_graph_task_id()
        return task != -1 and task != getattr(self._local, "task", -1)

    @contextmanager
    def holding(self, value: Delivered | None) -> Iterator[None]:
        """Hold ``value``; afterwards, also after an exception, what was held before."""
        local = self._local
        before = getattr(local, "value", None), getattr(local, "task", -1)
        local.value, local.task = value, torch._C._current_graph_task_id()
        try:
            yield
        finally:
            local.value, local.task = before

    def __deepcopy__(self, memo: dict[int, Any]) -> Slot:
        return Slot()  # deepcopy's memo makes the copied layers share it

    def __reduce__(self) -> tuple[type[Slot], tuple[()]]:
        return Slot, ()


@contextmanager
def condition(
    model: nn.Module,
    y: Tensor | ConditionState | None,
    mask: Tensor | None = None,
    *,
    index: Tensor | None = None,
    input_mask: Tensor | None = None,
) -> Iterator[None]:
    """Deliver a condition to every routed layer of ``model`` for the calls inside the ``with``.

    Nests (the outer condition comes back afterwards), holds for the current thread only, and ends with an exception
    too.
    The model need not be attached: layers put in by hand are found as well.

    Args:
        model: the model, or any module with routed layers in it.
        y: the condition [B, M, d_c] or [B, d_c], or a ConditionState of the model's only routed layer. None for
            in-sequence layers, which take only ``mask``.
        mask: bool or 0/1 integers [B, M], True where a condition token is valid; in-sequence [B, N].
        index: int [B], which condition each sample uses.
        input_mask: bool or 0/1 integers [B, N], True where an input token is valid; only cross_gram reads it.

    Raises:
        RoutedPeftError: ``model`` holds no routed layer.
        TypeError: ``y`` is none of the above.
    """
    if not (y is None or isinstance(y, (Tensor, ConditionState))):
        raise TypeError(f"condition takes a Tensor, a ConditionState or None, got {type(y).__name__}")
    slots = slots_of(model)
    if not slots:
        raise RoutedPeftError(
            f"{type(model).__name__} holds no routed layer to give a condition to; call routed_peft.attach first, "
            "or put RoutedLoRA or RoutedAdapter layers into it"
        )
    bind_checkpoints(model, slots)
    with ExitStack() as stack:
        for slot in slots:
            stack.enter_context(slot.holding(Delivered(y, mask, index, input_mask)))
        yield


def slots_of(model: nn.Module) -> list[Slot]:
    """The slots that the routed layers in ``model`` read: one, unless parts of it were attached on their own.

    Layers without a slot are linked to one first.
    """
    from .modules import RoutedLayer  # modules needs this file

    layers = [module for module in model.modules() if isinstance(module, RoutedLayer)]
    slots = {id(layer.slot): layer.slot for layer in layers if layer.slot is not None}
    for layer in layers:
        if layer.slot is None:
            layer.slot = next(iter(slots.values()), None) or Slot()
            slots[id(layer.slot)] = layer.slot
    return list(slots.values())


# ------------------------------------------------------------------------------------------------ checkpointing
_FUNCTION = "_gradient_checkpointing_func"  # where transformers keeps it, on the models and layers that checkpoint


class BoundCheckpoint:
    """A model's checkpoint function that takes the condition along: what it recomputes sees the forward's condition.

    The condition's tensor travels as an argument of the checkpointed function, for a reentrant checkpoint lets
    gradients through its arguments only (think of a trainable projector that makes y); masks and indices come along by
    closure.
    An object and not a closure, so that a deep-copied model's function refers to the copy's slots.
    """

    def __init__(self, function: Callable[..., Any], slots: list[Slot]) -> None:
        self.function, self.slots = function, slots

    def __call__(self, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Checkpoint ``run(*args)`` with the conditions that the slots hold now."""
        if torch.compiler.is_compiling():  # the tracer refuses the slot's side effects, and its graph has y as an input
            return self.function(run, *args, **kwargs)
        # A slot filled before the running backward says nothing about this recomputation: the layers shall refuse it.
        taken = [(slot, slot.value()) for slot in self.slots if not slot.outlived()]

        def bound(*inputs: Any, **keywords: Any) -> Any:
            with ExitStack() as stack:
                for (slot, value), tensor in zip(taken, inputs, strict=False):
                    stack.enter_context(slot.holding(_with_tensor(value, tensor)))
                return run(*inputs[len(taken) :], **keywords)

        return self.function(bound, *(_tensor_of(value) for _, value in taken), *args, **kwargs)


def bind_checkpoints(model: nn.Module, slots: list[Slot]) -> None:
    """Wrap the checkpoint functions that transformers left on the modules of ``model``; again changes nothing."""
    if torch.compiler.is_compiling():
        return
    for module in model.modules():
        function = module.__dict__.get(_FUNCTION)
        if isinstance(function, BoundCheckpoint):
            function.slots.extend(slot for slot in slots if not any(slot is known for known in function.slots))
        elif function is not None:
            module.__dict__[_FUNCTION] = BoundCheckpoint(function, list(slots))


def unbind_checkpoints(model: nn.Module) -> None:
    """Give the modules of ``model`` their own checkpoint functions back."""
    for module in model.modules():
        function = module.__dict__.get(_FUNCTION)
        if isinstance(function, BoundCheckpoint):
            module.__dict__[_FUNCTION] = function.function


def bind_before_forward(model: nn.Module, args: Any) -> None:
    """Forward pre-hook of an attached model: checkpointing may have been enabled again since (Trainer does that)."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        bind_checkpoints(model, slots_of(model))


def _tensor_of(value: Delivered | None) -> Tensor | None:
    y = None if value is None else value.condition
    return y.tensor if isinstance(y, ConditionState) else y


def _with_tensor(value: Delivered | None, tensor: Tensor | None) -> Delivered | None:
    """``value`` with the tensor that the checkpointed function was given in place of its own."""
    if value is None or tensor is None:
        return value
    y = value.condition
    return value._replace(
        condition=ConditionState(y.routing, tensor, y.versions) if isinstance(y, ConditionState) else tensor
    )
