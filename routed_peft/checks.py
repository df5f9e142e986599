"""What a routed call asks of its arguments. Every error names the argument and both sizes.

Values (offsets, index) are looked at on the CPU only: elsewhere that would wait for the device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import ops
from .errors import ConditionShapeError
from .routes import ROUTES, SCALES, one_of


def check_routing(routing: str, scale: str, backend: str) -> None:
    """The names of the route, the scale and the backend."""
    one_of("routing", routing, ROUTES)
    one_of("condition_scale", scale, SCALES)
    if backend != "auto":
        one_of("backend", backend, ("auto", *ops.BACKENDS, "reference"))


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
    if y.dim() not in ((2,) if cu_seqlens is not None else (2, 3)) or y.shape[-1] != C.shape[1]:
        wanted = f"[rows, {C.shape[1]}]" if cu_seqlens is not None else f"[batch, tokens, {C.shape[1]}]"
        why = "; condition_features=None shares lora_A, so the condition needs in_features columns" if shared else ""
        raise ConditionShapeError(f"{name}: condition must be {wanted}, got {tuple(y.shape)}{why}")
    return y


def check_base(name: str, base: Tensor | None, x: Tensor, out_features: int, residual: bool) -> None:
    """A base layer's output is what the call itself returns, shape and dtype, and the only thing it is added to."""
    if base is None:
        return
    wanted = (*x.shape[:-1], out_features)
    if tuple(base.shape) != wanted or base.dtype != x.dtype:
        raise ConditionShapeError(f"{name}: base must be {x.dtype} {wanted}, got {base.dtype} {tuple(base.shape)}")
    if residual:
        raise ConditionShapeError(f"{name}: a base's output takes the place of a residual; pass one of them")


def check_mask(name: str, what: str, mask: Tensor | None, shape: tuple[int, ...], of: str) -> Tensor | None:
    """The mask as bool, of exactly ``shape``."""
    if mask is None:
        return None
    if mask.is_floating_point() or mask.is_complex():
        raise ConditionShapeError(f"{name}: {what} must be bool or 0/1 integers, got {mask.dtype}")
    if tuple(mask.shape) != tuple(shape):
        raise ConditionShapeError(f"{name}: {what} {tuple(mask.shape)} does not match {of} {tuple(shape)}")
    return mask.to(torch.bool).contiguous()


def check_cu_seqlens(name: str, what: str, cu: Tensor, flat: Tensor) -> Tensor:
    """Row offsets as int64."""
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
    return cu.to(torch.int64).contiguous()


def output_layout(
    name: str,
    A: Tensor,
    B: Tensor,
    W: Tensor | None,
    out_slices: Sequence[tuple[int, int]] | None,
    across: bool,
    out_features: int | None,
) -> tuple[tuple[int, ...], int, int]:
    """The slices flattened, the number of independent groups and o, all checked against A, B and W."""
    for what, matrix in (("A", A), ("B", B), ("W", W)):
        if matrix is not None and (matrix.dim() != 2 or matrix.shape[1] == 0):
            raise ConditionShapeError(f"{name}: {what} must be a matrix with columns, got {tuple(matrix.shape)}")
    pairs = [tuple(pair) for pair in out_slices] if out_slices else []
    rows, rank = B.shape
    width = rank * max(len(pairs), 1)
    if A.shape[0] != width:
        raise ConditionShapeError(f"{name}: A has {A.shape[0]} rows, but B {tuple(B.shape)} needs {width}")
    selected = sum(stop - start for start, stop in pairs) if pairs else rows
    if rows != selected:
        raise ConditionShapeError(f"{name}: B has {rows} rows, but out_slices select {selected}")
    least = max([stop for _, stop in pairs]) if pairs else selected  # max(default=) breaks the graph under compile
    total = W.shape[0] if W is not None else out_features if out_features is not None else least
    if W is not None and W.shape[1] != A.shape[1]:
        raise ConditionShapeError(f"{name}: W {tuple(W.shape)} does not match A {tuple(A.shape)}")
    if total < least or (not pairs and total != selected):
        raise ConditionShapeError(f"{name}: the output has {total} columns, but B and out_slices need {least}")
    if not pairs:
        return (), 1, total
    before = 0
    for start, stop in sorted(pairs):
        if not before <= start < stop:
            raise ConditionShapeError(f"{name}: out_slices must be non-empty and apart, got {pairs}")
        before = stop
    return tuple(bound for pair in pairs for bound in pair), 1 if across else len(pairs), total


def sample_layout(
    name: str,
    x: Tensor,
    condition: Tensor | None,
    source: str,
    mask: Tensor | None,
    index: Tensor | None,
    cu_seqlens: Tensor | None,
    condition_cu_seqlens: Tensor | None,
) -> tuple[int, Tensor | None]:
    """How many samples x holds, and which condition each of them uses (None: its own)."""
    given = cu_seqlens.shape[0] - 1 if cu_seqlens is not None else x.shape[0] if x.dim() > 2 else None
    if cu_seqlens is not None and x.dim() != 2:
        raise ConditionShapeError(f"{name}: cu_seqlens needs a flat input [rows, {x.shape[-1]}], got {tuple(x.shape)}")
    if source == "none":
        return (given if given is not None else 1), None
    if source == "in_sequence":
        assert mask is not None
        samples = given if given is not None else mask.shape[0]
        if x.dim() == 2 and cu_seqlens is None and (samples == 0 or x.shape[0] % samples):
            raise ConditionShapeError(f"{name}: {x.shape[0]} input rows cannot be split over mask batch {samples}")
        return samples, None
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
        if not torch.compiler.is_compiling() and index.device.type == "cpu" and index.numel():
            low, high = (int(t) for t in index.aminmax())
            if low < 0 or high >= conditions:
                raise ConditionShapeError(
                    f"{name}: condition_index {low if low < 0 else high} is out of range for {conditions} conditions"
                )
        index = index.to(torch.int64).contiguous()
    else:
        samples = given if given is not None else conditions
        if samples != conditions:
            # beams: k rows in a row for each condition, as generate() lays them out
            if torch.is_grad_enabled() or conditions == 0 or samples % conditions:
                raise ConditionShapeError(f"{name}: input batch {samples} does not match condition batch {conditions}")
            index = torch.arange(conditions, device=x.device).repeat_interleave(samples // conditions)
    if x.dim() == 2 and cu_seqlens is None and (x.shape[0] % samples if samples else x.shape[0]):
        raise ConditionShapeError(f"{name}: {x.shape[0]} input rows cannot be split over condition batch {samples}")
    return samples, index


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
) -> None:
    """A state must have the route's shape, and an unpooled elementwise route one condition token per input token."""
    if source == "none":
        return
    elementwise = ROUTES[routing].state == "tokens"
    if source == "state":
        assert condition is not None
        good = condition.shape[1] == width if condition.dim() == 2 else condition.dim() == 3 and (
            condition.shape[2] == width if elementwise else condition.shape[1] == width
        )  # fmt: skip
        if not good or (condition.dim() == 3 and ROUTES[routing].state == "vector"):
            raise ConditionShapeError(
                f"{name}: a ConditionState of shape {tuple(condition.shape)} does not fit routing {routing!r} "
                f"at width {width}"
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
