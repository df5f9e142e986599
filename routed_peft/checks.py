"""What a routed call asks of its arguments. Every error names the argument and both sizes.

Values (offsets, index) are looked at on the CPU only: elsewhere that would wait for the device.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import ops
from .errors import ConditionShapeError, MissingConditionError
from .reference import Options
from .routes import ACTIVATIONS, ROUTES, SCALES, one_of, positive, resolve_pool

Others = tuple[Tensor | None, ...]


class Asked(NamedTuple):
    """What the caller of a routed call asks for, apart from its tensors."""

    state_of: str | None  # the route of the ConditionState, if the condition is one
    routing: str
    scaling: float
    scale: str
    pool: str
    activation: str
    residual: bool
    dropout: float
    condition_dropout: float
    out_slices: tuple[tuple[int, ...], ...]
    route_across_slices: bool
    out_features: int | None
    backend: str


def check_call(
    name: str, dtype: torch.dtype, asked: Asked, tensors: Sequence[Tensor | None], others: Others
) -> Options:
    """All that a call has to fulfil but what `ready` sees to. Without offsets the answer follows from what is asked,
    from shapes, dtypes and devices, and for beams from whether gradients are on.

    Args:
        name: opens every error text.
        dtype: the dtype of the computation.
        asked: what is asked for.
        tensors: x, A, B, the condition (y or a state's tensor), C, W, bias, b_down, b_C and base.
        others: condition mask, condition index, input mask, cu_seqlens, condition_cu_seqlens and seed.

    Returns:
        The options.

    Raises:
        ConditionShapeError, MissingConditionError, ValueError, TypeError: something does not fit.
    """
    (
        state_of, routing, scaling, scale, pool, activation, residual, dropout_p, condition_p, out_slices, across,
        out_features, backend,
    ) = asked  # fmt: skip
    x, A, B, condition, C, W, bias, b_down, b_C, base = tensors
    mask, index, input_mask, cu_seqlens, condition_cu_seqlens, seed = others
    check_present(name, A=A, B=B)
    check_tensors(name, A=A, B=B, condition=condition, C=C, W=W, bias=bias, b_down=b_down, b_C=b_C, base=base,
                  condition_mask=mask, condition_index=index, input_mask=input_mask, cu_seqlens=cu_seqlens,
                  condition_cu_seqlens=condition_cu_seqlens, seed=seed)  # fmt: skip
    assert x is not None and A is not None and B is not None
    check_routing(routing, scale, backend)
    one_of("activation", activation, ACTIVATIONS)
    if not 0 <= dropout_p <= 1:
        raise ValueError(f"{name}: dropout_p must lie in [0, 1], got {dropout_p}")
    if not 0 <= condition_p <= 1:
        raise ValueError(f"{name}: condition_dropout_p must lie in [0, 1], got {condition_p}")
    if not x.is_floating_point():
        raise ConditionShapeError(f"{name}: the input must be floating point, got {x.dtype}")
    slices, groups, out_features = output_layout(name, A, B, W, out_slices, across, out_features)
    if x.dim() < 2 or x.shape[-1] != A.shape[1]:
        raise ConditionShapeError(f"{name}: input must be [..., {A.shape[1]}], got {tuple(x.shape)}")
    check_vector(name, "bias", bias, out_features)
    check_vector(name, "b_down", b_down, A.shape[0])
    check_vector(name, "b_C", b_C, A.shape[0])
    check_seed(name, seed, x)
    check_devices(name, x, A=A, B=B, C=C, W=W, bias=bias, b_down=b_down, b_C=b_C, base=base,
                  condition_mask=mask, condition_index=index, input_mask=input_mask, cu_seqlens=cu_seqlens,
                  condition_cu_seqlens=condition_cu_seqlens)  # fmt: skip
    check_base(name, base, x, dtype, out_features, residual)
    if residual and out_features != x.shape[-1]:
        raise ConditionShapeError(
            f"{name}: a residual needs as many outputs as inputs, got {out_features} and {x.shape[-1]}"
        )

    if routing == "none":
        source, condition, mask, index, condition_cu_seqlens = "none", None, None, None, None
    elif state_of is not None:
        source = "state"
        if state_of != routing:
            raise ConditionShapeError(f"{name}: the ConditionState is for routing {state_of!r}, not {routing!r}")
        if condition_cu_seqlens is not None:
            raise ConditionShapeError(f"{name}: condition_cu_seqlens goes with a flat condition, not a ConditionState")
    elif condition is None:
        source = "in_sequence"
        if mask is None:
            raise MissingConditionError(
                f"{name}: no condition was given; without one the route is in-sequence and needs mask [batch, tokens]"
            )
        if C is not None:
            raise ConditionShapeError(
                f"{name}: an in-sequence condition shares A, so C must be None, got {tuple(C.shape)}"
            )
        if index is not None:
            raise ConditionShapeError(f"{name}: an in-sequence condition takes no condition_index")
    else:
        source = "tokens"
        check_condition(name, condition, A if C is None else C, condition_cu_seqlens, shared=C is None)
        if C is not None and C.shape[0] != A.shape[0]:
            raise ConditionShapeError(f"{name}: C has {C.shape[0]} rows, but A {tuple(A.shape)} needs {A.shape[0]}")
        if C is None and b_C is not None:
            raise ConditionShapeError(f"{name}: b_C goes with a C; a shared projection shares b_down")
    if condition is not None:
        check_devices(name, x, condition=condition)

    if cu_seqlens is not None:
        check_cu_seqlens(name, "cu_seqlens", cu_seqlens, x)
        if input_mask is not None:
            raise ConditionShapeError(f"{name}: input_mask goes with padded batches; a flat input has no padding")
    if condition_cu_seqlens is not None and condition is not None:
        check_cu_seqlens(name, "condition_cu_seqlens", condition_cu_seqlens, condition)
    samples = sample_layout(name, x, condition, source, mask, index, cu_seqlens, condition_cu_seqlens)
    if mask is not None:
        if source == "state":
            raise ConditionShapeError(f"{name}: a ConditionState already has its mask; pass no condition_mask with it")
        if source == "in_sequence":
            by_sample = _positions(x, samples, cu_seqlens)
            check_mask(name, "in-sequence condition mask", mask, by_sample, "input")
        elif condition is not None:
            if condition_cu_seqlens is not None:
                raise ConditionShapeError(
                    f"{name}: condition_mask goes with padded conditions; a flat condition has no padding"
                )
            shape = tuple(condition.shape[:2]) if condition.dim() == 3 else (condition.shape[0], 1)
            check_mask(name, "condition mask", mask, shape, "condition")
    if routing == "cross_gram" and input_mask is not None:
        check_mask(name, "input mask", input_mask, _positions(x, samples, cu_seqlens), "input")
    pool = resolve_pool(routing, pool)
    check_elementwise(
        name, routing, source, pool, condition, x, samples, cu_seqlens, condition_cu_seqlens, A.shape[0], groups
    )

    if source == "none" or source == "state":
        condition_p = 0.0
    elif source == "in_sequence":
        condition_p = dropout_p  # V is rows of T, so it shares X's mask
    # Autocast is for products: a residual that it would round is left to the caller.
    return Options(
        samples, routing, source, pool, scale, groups, slices, out_features, scaling, dropout_p, condition_p,
        activation, residual and x.dtype == dtype,
    )  # fmt: skip


def ready(name: str, options: Options, condition: Tensor | None, others: Others, alone: bool) -> Others:
    """The ``others`` of a call that fulfils `check_call`, as the ops take them; the values of an index are looked at.
    ``alone`` is what ``ops.untouched()`` said.

    Raises:
        ConditionShapeError: the index points beyond the conditions.
    """
    mask, index, input_mask, cu_seqlens, condition_cu_seqlens, seed = others
    if options.source == "none":
        mask = index = condition_cu_seqlens = None
    elif condition is not None:
        conditions = condition.shape[0] if condition_cu_seqlens is None else condition_cu_seqlens.shape[0] - 1
        if index is not None:
            index = _index(name, index, conditions)
        elif options.samples != conditions:
            make = _beams_again if alone else _beams
            index = make(conditions, options.samples // conditions, condition.device)
    if options.routing != "cross_gram":
        input_mask = None
    mask, input_mask = (None if t is None else t.to(torch.bool).contiguous() for t in (mask, input_mask))
    offsets = (None if t is None else t.to(torch.int64).contiguous() for t in (cu_seqlens, condition_cu_seqlens))
    return (mask, index, input_mask, *offsets, seed)


def _index(name: str, index: Tensor, conditions: int) -> Tensor:
    if not torch.compiler.is_compiling() and index.device.type == "cpu" and index.numel():
        low, high = (int(t) for t in index.aminmax())
        if low < 0 or high >= conditions:
            raise ConditionShapeError(
                f"{name}: condition_index {low if low < 0 else high} is out of range for {conditions} conditions"
            )
    return index.to(torch.int64).contiguous()


def _beams(conditions: int, each: int, device: torch.device) -> Tensor:
    """The index of ``each`` rows in a row for every condition, as generate() lays beams out."""
    return torch.arange(conditions, device=device).repeat_interleave(each)


def _beams_again(conditions: int, each: int, device: torch.device) -> Tensor:
    """The same for all layers and steps, on the stream that made it. None is kept for a graph that is being captured,
    which would read it for longer than it may be here."""
    if device.type != "cuda":
        return _kept_beams(conditions, each, device, 0)
    if torch.cuda.is_current_stream_capturing():
        return _beams(conditions, each, device)
    return _kept_beams(conditions, each, device, torch.cuda.current_stream(device).cuda_stream)


@functools.lru_cache(64)
def _kept_beams(conditions: int, each: int, device: torch.device, stream: int) -> Tensor:
    return _beams(conditions, each, device)


def _positions(x: Tensor, samples: int, cu_seqlens: Tensor | None) -> tuple[int, ...]:
    """The shape of a mask of x: [B, N], or [ΣN_i] with offsets."""
    if cu_seqlens is not None:
        return (x.shape[0],)
    return (samples, math.prod(x.shape[1:-1]) if x.dim() > 2 else x.shape[0] // samples if samples else 0)


def check_routing(routing: str, scale: str, backend: str) -> None:
    """The names of the route, the scale and the backend."""
    one_of("routing", routing, ROUTES)
    one_of("condition_scale", scale, SCALES)
    if backend != "auto":
        one_of("backend", backend, ("auto", *ops.BACKENDS, "reference"))


def check_tensors(name: str, **tensors: object) -> None:
    """Every one of the named arguments is a tensor, or absent."""
    for argument, tensor in tensors.items():
        if tensor is not None and not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: {argument} must be a Tensor, got {type(tensor).__name__}")


def check_present(name: str, **tensors: object) -> None:
    """None of the named arguments is absent."""
    for argument, tensor in tensors.items():
        if tensor is None:
            raise TypeError(f"{name}: {argument} must be a Tensor, got None")


def check_devices(name: str, x: Tensor, what: str = "layer input", **tensors: Tensor | None) -> None:
    """Every one of the named tensors lies where x does; ``what`` is what x is called."""
    device = x.device
    for argument, tensor in tensors.items():
        if tensor is not None and tensor.device != device:
            raise ConditionShapeError(f"{name}: {argument} is on {tensor.device}, the {what} on {device}")


def check_vector(name: str, what: str, vector: Tensor | None, size: int) -> None:
    """A bias, where it is there, is a vector of ``size``."""
    if vector is not None and tuple(vector.shape) != (size,):
        raise ConditionShapeError(f"{name}: {what} must be [{size}], got {tuple(vector.shape)}")


def check_seed(name: str, seed: Tensor | None, x: Tensor) -> None:
    """A dropout seed is one int64, where the input lies."""
    if seed is not None and (seed.dtype != torch.int64 or seed.numel() != 1 or seed.device != x.device):
        raise ConditionShapeError(
            f"{name}: seed must be int64 [1] on {x.device}, got {seed.dtype} {tuple(seed.shape)} on {seed.device}"
        )


def check_condition(name: str, y: Tensor, C: Tensor, cu_seqlens: Tensor | None, shared: bool) -> Tensor:
    """y [B, M, d_c], [B, d_c] or, with offsets, [ΣM_i, d_c]."""
    if not y.is_floating_point():
        raise ConditionShapeError(f"{name}: condition must be floating point, got {y.dtype}")
    if C.dim() != 2:
        raise ConditionShapeError(f"{name}: C must be a matrix, got {tuple(C.shape)}")
    if y.dim() not in ((2,) if cu_seqlens is not None else (2, 3)) or y.shape[-1] != C.shape[1]:
        wanted = f"[rows, {C.shape[1]}]" if cu_seqlens is not None else f"[batch, tokens, {C.shape[1]}]"
        why = "; condition_features=None shares lora_A, so the condition needs in_features columns" if shared else ""
        raise ConditionShapeError(f"{name}: condition must be {wanted}, got {tuple(y.shape)}{why}")
    return y


def check_groups(name: str, C: Tensor, groups: int) -> None:
    """The output slices that route on their own share C's rows evenly."""
    positive("groups", groups)
    if C.shape[0] % groups:
        raise ConditionShapeError(f"{name}: groups must divide the {C.shape[0]} rows of C, got {groups}")


def check_base(
    name: str, base: Tensor | None, x: Tensor, dtype: torch.dtype, out_features: int, residual: bool
) -> None:
    """A base layer's output is what the call itself returns, shape and dtype, and the only thing it is added to."""
    if base is None:
        return
    wanted = (*x.shape[:-1], out_features)
    if tuple(base.shape) != wanted or base.dtype != dtype:
        raise ConditionShapeError(f"{name}: base must be {dtype} {wanted}, got {base.dtype} {tuple(base.shape)}")
    if residual:
        raise ConditionShapeError(f"{name}: a base's output takes the place of a residual; pass one of them")


def check_mask(name: str, what: str, mask: Tensor, shape: tuple[int, ...], of: str) -> None:
    """A mask is of bool or integers, and of exactly ``shape``."""
    if mask.is_floating_point() or mask.is_complex():
        raise ConditionShapeError(f"{name}: {what} must be bool or 0/1 integers, got {mask.dtype}")
    if tuple(mask.shape) != tuple(shape):
        raise ConditionShapeError(f"{name}: {what} {tuple(mask.shape)} does not match {of} {tuple(shape)}")


def check_cu_seqlens(name: str, what: str, cu: Tensor, flat: Tensor) -> None:
    """Row offsets are integers that rise from 0 to the rows of ``flat``."""
    if cu.dim() != 1 or cu.shape[0] < 1 or cu.dtype not in (torch.int32, torch.int64):
        raise ConditionShapeError(
            f"{name}: {what} must be int32 or int64 [batch + 1], got {cu.dtype} {tuple(cu.shape)}"
        )
    if not torch.compiler.is_compiling() and cu.device.type == "cpu":
        bounds = cu.tolist()
        if (
            bounds[0] != 0
            or bounds[-1] != flat.shape[0]
            or any(b < a for a, b in zip(bounds, bounds[1:], strict=False))
        ):
            raise ConditionShapeError(f"{name}: {what} must rise from 0 to the {flat.shape[0]} rows, got {bounds}")


def output_layout(
    name: str,
    A: Tensor,
    B: Tensor,
    W: Tensor | None,
    out_slices: tuple[tuple[int, ...], ...],
    across: bool,
    out_features: int | None,
) -> tuple[tuple[int, ...], int, int]:
    """The slices flattened, the number of independent groups and o, all checked against A, B and W."""
    for what, matrix in (("A", A), ("B", B), ("W", W)):
        if matrix is not None and (matrix.dim() != 2 or matrix.shape[1] == 0):
            raise ConditionShapeError(f"{name}: {what} must be a matrix with columns, got {tuple(matrix.shape)}")
    bounds = [bound for pair in out_slices for bound in pair] + ([] if out_features is None else [out_features])
    if not all(isinstance(bound, int | torch.SymInt) for bound in bounds):
        raise ConditionShapeError(
            f"{name}: out_slices and out_features must be integers, got {out_slices} and {out_features}"
        )
    rows, rank = B.shape
    width = rank * max(len(out_slices), 1)
    if A.shape[0] != width:
        raise ConditionShapeError(f"{name}: A has {A.shape[0]} rows, but B {tuple(B.shape)} needs {width}")
    selected = sum(stop - start for start, stop in out_slices) if out_slices else rows
    if rows != selected:
        raise ConditionShapeError(f"{name}: B has {rows} rows, but out_slices select {selected}")
    # max(default=) breaks the graph under compile
    least = max([stop for _, stop in out_slices]) if out_slices else selected
    total = W.shape[0] if W is not None else out_features if out_features is not None else least
    if W is not None and W.shape[1] != A.shape[1]:
        raise ConditionShapeError(f"{name}: W {tuple(W.shape)} does not match A {tuple(A.shape)}")
    if total < least or (not out_slices and total != selected):
        raise ConditionShapeError(f"{name}: the output has {total} columns, but B and out_slices need {least}")
    if not out_slices:
        return (), 1, total
    before = 0
    for start, stop in sorted(out_slices):
        if not before <= start < stop:
            raise ConditionShapeError(f"{name}: out_slices must be non-empty and apart, got {out_slices}")
        before = stop
    return tuple(bound for pair in out_slices for bound in pair), 1 if across else len(out_slices), total


def sample_layout(
    name: str,
    x: Tensor,
    condition: Tensor | None,
    source: str,
    mask: Tensor | None,
    index: Tensor | None,
    cu_seqlens: Tensor | None,
    condition_cu_seqlens: Tensor | None,
) -> int:
    """How many samples x holds, each of which has a condition of its own, one by the index, or its beam's."""
    given = cu_seqlens.shape[0] - 1 if cu_seqlens is not None else x.shape[0] if x.dim() > 2 else None
    if cu_seqlens is not None and x.dim() != 2:
        raise ConditionShapeError(f"{name}: cu_seqlens needs a flat input [rows, {x.shape[-1]}], got {tuple(x.shape)}")
    if source == "none":
        return given if given is not None else 1
    if source == "in_sequence":
        assert mask is not None
        samples = given if given is not None else mask.shape[0]
        if x.dim() == 2 and cu_seqlens is None and (samples == 0 or x.shape[0] % samples):
            raise ConditionShapeError(f"{name}: {x.shape[0]} input rows cannot be split over mask batch {samples}")
        return samples
    assert condition is not None
    conditions = condition_cu_seqlens.shape[0] - 1 if condition_cu_seqlens is not None else condition.shape[0]
    if index is not None:
        if index.dim() != 1 or index.is_floating_point() or index.is_complex() or index.dtype == torch.bool:
            raise ConditionShapeError(
                f"{name}: condition_index must be integers [batch], got {index.dtype} {tuple(index.shape)}"
            )
        samples = given if given is not None else index.shape[0]
        if index.shape[0] != samples:
            raise ConditionShapeError(
                f"{name}: input batch {samples} does not match condition_index {tuple(index.shape)}"
            )
    else:
        samples = given if given is not None else conditions
        # no gradients: perhaps beams
        if samples != conditions and (torch.is_grad_enabled() or conditions == 0 or samples % conditions):
            raise ConditionShapeError(f"{name}: input batch {samples} does not match condition batch {conditions}")
    if x.dim() == 2 and cu_seqlens is None and (x.shape[0] % samples if samples else x.shape[0]):
        raise ConditionShapeError(f"{name}: {x.shape[0]} input rows cannot be split over condition batch {samples}")
    return samples


def check_elementwise(
    name: str,
    routing: str,
    source: str,
    pool: str,
    condition: Tensor | None,
    x: Tensor,
    samples: int,
    cu_seqlens: Tensor | None,
    condition_cu_seqlens: Tensor | None,
    width: int,
    groups: int,
) -> None:
    """A state must have the route's shape, and an unpooled elementwise route one condition token per input token."""
    if source == "none":
        return
    elementwise = ROUTES[routing].state == "tokens"
    if source == "state":
        assert condition is not None
        ends = (width,) if condition.dim() == 2 or elementwise else (width, width // groups)
        good = condition.dim() in (2, 3) and tuple(condition.shape[-len(ends) :]) == ends
        if not good or (condition.dim() == 3 and ROUTES[routing].state == "vector"):
            raise ConditionShapeError(
                f"{name}: a ConditionState of shape {tuple(condition.shape)} does not fit routing {routing!r} "
                f"at width {width} in {groups} group{'s' * (groups != 1)}"
            )
        if not elementwise or condition.dim() == 2:
            return
    elif not elementwise or pool != "none" or source == "in_sequence":
        return
    assert condition is not None
    if condition_cu_seqlens is None and source == "tokens" and (condition.dim() == 2 or condition.shape[1] == 1):
        return
    if (cu_seqlens is None) != (condition_cu_seqlens is None):
        raise ConditionShapeError(
            f"{name}: condition_pool='none' under routing {routing!r} pairs tokens, so input and condition must "
            "both be flat or both be padded"
        )
    if cu_seqlens is not None and condition_cu_seqlens is not None:
        readable = not torch.compiler.is_compiling() and cu_seqlens.device.type == "cpu"
        if cu_seqlens.shape != condition_cu_seqlens.shape or (
            readable and not torch.equal(cu_seqlens, condition_cu_seqlens)
        ):
            raise ConditionShapeError(
                f"{name}: condition_pool='none' under routing {routing!r} needs equal cu_seqlens for input and "
                "condition"
            )
        return
    tokens = condition.shape[1] if condition.dim() == 3 else 1
    n = x.numel() // max(x.shape[-1] * samples, 1)
    if tokens not in (1, n):
        raise ConditionShapeError(
            f"{name}: condition_pool='none' under routing {routing!r} needs 1 condition token or as many as the input "
            f"has ({n}), got {tokens}"
        )
