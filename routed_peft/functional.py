"""The routed operator as differentiable functions.

``routed_lora`` is the low-rank update alone, ``routed_linear`` a linear layer with it, ``routed_adapter`` the Adapter
form. Each is one call of the C++ library forward and one backward (``ops``), tied together by an autograd function
here; ``backend="reference"`` runs the definition (``reference``) instead.

Shapes: B samples, N input tokens, M condition tokens; d, d_c, o input, condition and output widths; R bottleneck width.
Source: Qu et al., ECCV 2024 (arXiv 2403.09377); shared forms and gradients as in ``reference``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import unwrap_dead_wrappers
from torch.autograd import forward_ad

from . import ops, reference
from .checks import (
    Asked,
    Others,
    check_call,
    check_condition,
    check_devices,
    check_groups,
    check_mask,
    check_present,
    check_routing,
    check_tensors,
    check_vector,
    ready,
)
from .reference import Options
from .routes import ACTIVATIONS, POOLS, ROUTES, SCALES, SOURCES, resolve_pool
from .state import ConditionState, versions_of


def routed_lora(
    x: Tensor,
    A: Tensor,
    state_or_y: ConditionState | Tensor | None,
    B: Tensor,
    C: Tensor | None = None,
    *,
    routing: str,
    scaling: float,
    mask: Tensor | None = None,
    index: Tensor | None = None,
    input_mask: Tensor | None = None,
    pool: str = "auto",
    scale: str = "tokens",
    dropout_p: float = 0.0,
    condition_dropout_p: float | None = None,
    seed: Tensor | None = None,
    out_slices: Sequence[tuple[int, int]] | None = None,
    route_across_slices: bool = False,
    out_features: int | None = None,
    cu_seqlens: Tensor | None = None,
    condition_cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """The update alone: ``scaling · ρ(drop(x) Aᵀ, drop(y) Cᵀ) B̂ᵀ``.

    Args:
        x: [B, N, d], or [B·N, d], or with ``cu_seqlens`` [ΣN_i, d].
        A: [R, d] down-projection.
        state_or_y: the condition y [B, M, d_c] or [B, d_c] (with ``condition_cu_seqlens`` [ΣM_i, d_c]); or a
            :class:`ConditionState`; or None for the in-sequence form, where V is the rows of T at the positions that
            ``mask`` [B, N] (with ``cu_seqlens`` [ΣN_i]) marks.
        B: [o, r] up-projection; with ``out_slices`` the slices' rows below one another.
        C: [R, d_c] projection of the condition; None shares A, which needs d_c = d.
        routing: a route's name (see README).
        scaling: the factor s.
        mask: bool or 0/1 integers [B, M], True where a condition token is valid.
        index: int [B], which condition each sample of x uses. None: its own; and without gradients also where x has k
            times as many samples, of which k in a row share one, as generate() lays out beams.
        input_mask: bool or 0/1 integers [B, N], True where an input token is valid; only cross_gram reads it.
        pool: "auto", "mean", "first" or "none".
        scale: "tokens" divides gram, gram_relu and ones by the number of valid condition tokens; "none" is the paper's.
        dropout_p: dropout probability of x.
        condition_dropout_p: that of y; None takes ``dropout_p``.
        seed: int64 [1] that determines the dropout masks; None draws one from torch's generator.
        out_slices: (start, stop) of each adapted slice of the output; None adapts all of it.
        route_across_slices: route the slices' bottlenecks as one of R columns instead of one by one.
        out_features: o, where ``out_slices`` does not reach the end.
        cu_seqlens: int [B + 1], row offsets of the samples in a flat x.
        condition_cu_seqlens: the same for a flat y.
        backend: "auto", "cpu", "cuda" or "reference".

    Returns:
        [..., o] in x's dtype (the autocast dtype where autocast is on).

    Raises:
        ConditionShapeError: sizes, dtypes or devices do not fit; the text names the argument and both sizes.
        StaleStateError: the state is older than the parameters.
        TypeError: an argument that is to be a tensor is none.
        UnsupportedError: the chosen backend cannot serve the call.
    """
    return apply(
        "routed_lora", x, A, state_or_y, B, C, routing=routing, scaling=scaling, mask=mask, index=index,
        input_mask=input_mask, pool=pool, scale=scale, dropout_p=dropout_p, condition_dropout_p=condition_dropout_p,
        seed=seed, out_slices=out_slices, route_across_slices=route_across_slices, out_features=out_features,
        cu_seqlens=cu_seqlens, condition_cu_seqlens=condition_cu_seqlens, backend=backend,
    )  # fmt: skip


def routed_linear(
    x: Tensor,
    W: Tensor,
    bias: Tensor | None,
    state_or_y: ConditionState | Tensor | None,
    A: Tensor,
    B: Tensor,
    C: Tensor | None = None,
    *,
    routing: str,
    scaling: float,
    **options: Any,
) -> Tensor:
    """``x Wᵀ + bias`` plus the update of :func:`routed_lora`, as one autograd node; dW and dbias when asked for.

    Args:
        x: as :func:`routed_lora`.
        W: [o, d] weight of the base layer, in x's dtype.
        bias: [o] or None.
        state_or_y: as :func:`routed_lora`.
        A: [R, d].
        B: [o, r].
        C: [R, d_c] or None.
        routing: a route's name.
        scaling: the factor s.
        **options: the keywords of :func:`routed_lora`.

    Returns:
        [..., o] in x's dtype.

    Raises:
        As :func:`routed_lora`.
    """
    if W is None:  # apply() would give the update alone
        raise TypeError("routed_linear: W must be a Tensor, got None")
    return apply("routed_linear", x, A, state_or_y, B, C, W=W, bias=bias, routing=routing, scaling=scaling, **options)


def routed_adapter(
    x: Tensor,
    state_or_y: ConditionState | Tensor | None,
    down: Tensor,
    b_down: Tensor | None,
    up: Tensor,
    b_up: Tensor | None,
    C: Tensor | None = None,
    b_C: Tensor | None = None,
    *,
    routing: str,
    activation: str = "gelu",
    residual: bool = True,
    mask: Tensor | None = None,
    index: Tensor | None = None,
    input_mask: Tensor | None = None,
    pool: str = "auto",
    scale: str = "tokens",
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """The Adapter form: ``x + act(ρ(drop(x) downᵀ + b_down, drop(y) Cᵀ + b_C)) upᵀ + b_up`` (the x if ``residual``).

    Args:
        x: [B, N, d] or [B·N, d].
        state_or_y: as :func:`routed_lora`.
        down: [R, d].
        b_down: [R] or None.
        up: [o, R]; o = d with ``residual``.
        b_up: [o] or None.
        C: [R, d_c]; None shares ``down`` and ``b_down``.
        b_C: [R] or None.
        routing: a route's name.
        activation: "gelu" (erf), "gelu_tanh", "relu", "silu" or "none", after the route.
        residual: add x.
        mask: as :func:`routed_lora`, like the arguments that follow.
        index: int [B].
        input_mask: [B, N].
        pool: pooling of the condition.
        scale: "tokens" or "none".
        dropout_p: dropout probability of x and y (independent masks).
        seed: int64 [1].
        backend: "auto", "cpu", "cuda" or "reference".

    Returns:
        [..., o] in x's dtype; without ``residual`` under autocast in autocast's.

    Raises:
        As :func:`routed_lora`.
    """
    return apply(
        "routed_adapter", x, down, state_or_y, up, C, bias=b_up, b_down=b_down, b_C=b_C, routing=routing, scaling=1.0,
        activation=activation, residual=residual, mask=mask, index=index, input_mask=input_mask, pool=pool, scale=scale,
        dropout_p=dropout_p, seed=seed, backend=backend,
    )  # fmt: skip


def encode_condition(
    y: Tensor,
    C: Tensor,
    *,
    routing: str,
    mask: Tensor | None = None,
    pool: str = "auto",
    scale: str = "tokens",
    b_C: Tensor | None = None,
    groups: int = 1,
    backend: str = "auto",
    name: str = "encode_condition",
) -> ConditionState:
    """Encode a condition once, to be used by many calls (decode steps, several questions about one image).

    Args:
        y: condition features [B, M, d_c] or [B, d_c].
        C: [R, d_c] projection (``A`` where it is shared).
        routing: a route's name; "none" has no condition.
        mask: bool or 0/1 integers [B, M], True where valid.
        pool: "auto", "mean", "first" or "none".
        scale: "tokens" or "none".
        b_C: [R] bias of the Adapter form.
        groups: number of output slices that route independently.
        backend: "auto", "cpu", "cuda" or "reference".
        name: how errors call the layer.

    Returns:
        The state, float32 (float64 for a float64 y). No dropout is applied to y.

    Raises:
        ConditionShapeError: sizes, dtypes or devices do not fit.
        ValueError: an option out of range.
    """
    check_routing(routing, scale, backend)
    if routing == "none":
        raise ValueError(f"{name}: routing 'none' has no condition to encode")
    check_present(name, condition=y, C=C)
    check_tensors(name, condition=y, C=C, b_C=b_C, condition_mask=mask)
    pool = resolve_pool(routing, pool)
    y = check_condition(name, y, C, None, shared=False)
    check_devices(name, y, what="condition", C=C, b_C=b_C, condition_mask=mask)
    check_vector(name, "b_C", b_C, C.shape[0])
    check_groups(name, C, groups)
    y = y.to(compute_dtype(y)).contiguous()
    if mask is not None:
        check_mask(name, "condition mask", mask, y.shape[:2] if y.dim() == 3 else (y.shape[0], 1), "condition")
        mask = mask.to(torch.bool).contiguous()
    where = ops.resolve_backend(backend, routing, C.shape[0] // groups, groups, y.dtype, y.device)
    if where == "reference":
        options = Options(y.shape[0], routing, "tokens", pool, scale, groups, (), 0, 1.0, 0.0, 0.0, "none", False)
        state = reference.run_encode(y, C, b_C, mask, options)
    else:
        numbers = (ROUTES[routing].code, POOLS[pool], SCALES[scale], groups)
        if _differentiated(y, C, b_C):
            state = _record(_Encode, y, C, b_C, (where, mask, numbers))[0]
        else:
            state = ops.run(ops.BACKENDS[where].ops.encode, y, C, b_C, mask, *numbers, False)[0]
    return ConditionState(routing, state, versions_of(C, b_C))


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype a layer computes in: autocast's where it is on for x's device, else x's own."""
    dtype = x.dtype
    if (x.is_cpu or x.is_cuda) and not torch._C._is_any_autocast_enabled():  # which does not know of every device
        return dtype
    if not dtype.is_floating_point or dtype == torch.float64:
        return dtype
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if kind != "meta" and torch.is_autocast_enabled(kind) else dtype


def draw_seed(device: torch.device) -> Tensor:
    """A dropout seed, int64 [1], from torch's generator of ``device``."""
    return torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64, device=device)


# ------------------------------------------------------------------------------------------------ the one call
def apply(
    name: str,
    x: Tensor,
    A: Tensor,
    state_or_y: ConditionState | Tensor | None,
    B: Tensor,
    C: Tensor | None,
    *,
    routing: str,
    scaling: float,
    W: Tensor | None = None,
    bias: Tensor | None = None,
    b_down: Tensor | None = None,
    b_C: Tensor | None = None,
    activation: str = "none",
    residual: bool = False,
    mask: Tensor | None = None,
    index: Tensor | None = None,
    input_mask: Tensor | None = None,
    pool: str = "auto",
    scale: str = "tokens",
    dropout_p: float = 0.0,
    condition_dropout_p: float | None = None,
    seed: Tensor | None = None,
    out_slices: Sequence[tuple[int, int]] | None = None,
    route_across_slices: bool = False,
    out_features: int | None = None,
    cu_seqlens: Tensor | None = None,
    condition_cu_seqlens: Tensor | None = None,
    base: Tensor | None = None,
    own_state: bool = False,
    backend: str = "auto",
) -> Tensor:
    """What the three public forms share: check the arguments, then run the backend. ``name`` opens every error text.

    ``base`` [..., o], in the dtype of the computation, is what some other layer gave for x: the update is added to it
    as it is written, in one pass. It is only read, for others may hold it too. With ``own_state`` a state has to be
    made of the very matrix, and bias, that would project the condition.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: the input must be a Tensor, got {type(x).__name__}")
    p = float(dropout_p)
    condition_p = p if condition_dropout_p is None else float(condition_dropout_p)
    dtype, residual = compute_dtype(x), bool(residual)
    state = state_or_y if isinstance(state_or_y, ConditionState) else None
    alone, projection = ops.untouched(), (A, b_down) if C is None else (C, b_C)
    if state is not None and routing != "none" and not (alone and state.is_of(*projection)):
        state.check_fresh(name, *projection, own=own_state)
    condition: Any = None if routing == "none" else state_or_y if state is None else state.tensor
    asked = (
        None if state is None else state.routing, routing, float(scaling), scale, pool, activation, residual, p,
        condition_p, () if out_slices is None else tuple(map(tuple, out_slices)), route_across_slices, out_features,
        backend,
    )  # fmt: skip
    tensors = (x, A, B, condition, C, W, bias, b_down, b_C, base)
    others: Others = (mask, index, input_mask, cu_seqlens, condition_cu_seqlens, seed)
    # What was found for a call holds for all that are like it. Not where values are looked at, nor where something in
    # torch looks on: sizes may be symbols there.
    like, bare = None, mask is None and index is None and input_mask is None and seed is None
    if alone and cu_seqlens is None and condition_cu_seqlens is None:
        parts = tensors if bare else (*tensors, mask, index, input_mask, seed)
        gradients = torch.is_grad_enabled()
        try:
            like = (dtype, asked, gradients, *[t if t is None else (t.shape, t.dtype, t.device) for t in parts])
        except AttributeError:  # of no tensor, which is to be refused
            like = None
    try:
        found = None if like is None else _found.get(like)
    except TypeError:  # an argument that is to be refused, or a fake tensor's symbolic size outside its mode
        like = found = None
    if found is None:
        options = check_call(name, dtype, Asked._make(asked), tensors, others)
        width, slices = A.shape[0] // options.groups, max(len(options.slices) // 2, 1)
        where = ops.resolve_backend(backend, routing, width, slices, dtype, x.device)
        beams = options.source in ("tokens", "state") and options.samples != condition.shape[0]
        lacks: Others = (b_down, mask, input_mask, cu_seqlens, condition_cu_seqlens)  # what `infer` has no place for
        lacks += (C, b_C) if options.source == "tokens" else ()
        short = not p and not options.condition_dropout and all(t is None for t in lacks)
        short = short and where != "reference" and options.groups <= _MOST_GROUPS
        few = _few_numbers(options) if short else None
        found = where, options, _numbers(options), few, beams
        if like is not None and where != "reference":
            if len(_found) >= _MOST_FOUND:
                _found.clear()
            _found[like] = found
    where, options, numbers, few, beams = found
    if like is None or not bare or beams:
        others = ready(name, options, condition, others, alone)

    source = options.source
    if source == "state":
        condition = _contiguous(condition, torch.float64 if dtype == torch.float64 else torch.float32)
    else:
        condition = None if condition is None else _contiguous(condition, dtype)
    if source != "tokens":
        C = b_C = None  # nothing is projected
    stream, x = x, _contiguous(x, dtype)
    if W is not None and W.dtype != dtype:
        W = W.to(dtype)
    base = None if base is None else base.contiguous()
    if seed is None and (p or options.condition_dropout):
        others = (*others[:-1], draw_seed(x.device))
    if few is not None and alone and not (torch.is_grad_enabled() or forward_ad._current_level >= 0):
        out = ops.run(ops.BACKENDS[where].ops.infer, x, A, B, condition, W, bias, base, others[1], *few, alone=True)
    else:
        inputs = (x, A, B, condition, C, W, bias, b_down, b_C)  # what may get a gradient
        if where == "reference":
            out = reference.run((*inputs, *others, base), options)
        # An exported program has no gradients; and what they need depends on sizes, which may be dynamic there.
        elif (not alone and torch.compiler.is_exporting()) or not _differentiated(*inputs, base):
            out = ops.run(ops.BACKENDS[where].ops.forward, *inputs, *others, base, *numbers, 0, alone=alone)[0]
        else:
            save = 0
            if _differentiated(*inputs):
                encodes = source in ("tokens", "in_sequence")
                through = (x if source == "in_sequence" else condition, *projection)
                save = 2 if encodes and any(t is not None and t.requires_grad for t in through) else 1
            out = _record(_Routed, *inputs, base, (where, others, numbers, save))[0]
    return out if residual == options.residual else out.to(stream.dtype) + stream  # type: ignore[no-any-return]


# What `apply` found for calls without offsets: backend, options, these as the ops `forward` and, where it will do,
# `infer` take them, and whether several samples share a condition without an index.
_found: dict[Any, tuple[str, Options, tuple[Any, ...], tuple[Any, ...] | None, bool]] = {}
_MOST_FOUND = 4096
_MOST_GROUPS = 2**15 - 1  # that `infer` has room for


def _numbers(options: Options) -> tuple[Any, ...]:
    """The options as ``forward`` and ``backward`` take them."""
    return (
        options.samples, ROUTES[options.routing].code, SOURCES[options.source], POOLS[options.pool],
        SCALES[options.scale], options.groups, list(options.slices), options.out_features, options.scaling,
        options.dropout, options.condition_dropout, ACTIVATIONS[options.activation], options.residual,
    )  # fmt: skip


def _few_numbers(options: Options) -> tuple[Any, ...]:
    """The options as ``infer`` takes them, which has no dropout."""
    choices = (
        ROUTES[options.routing].code, SOURCES[options.source], POOLS[options.pool], SCALES[options.scale],
        ACTIVATIONS[options.activation], int(options.residual), options.groups,
    )  # fmt: skip
    together = sum(choice << 8 * i for i, choice in enumerate(choices))
    return options.samples, together, list(options.slices), options.out_features, options.scaling


def _contiguous(t: Tensor, dtype: torch.dtype) -> Tensor:
    return (t if t.dtype == dtype else t.to(dtype)).contiguous()


def _differentiated(*tensors: Tensor | None) -> bool:
    """Whether autograd has to see the call. Inside a forward-mode level it always has: the node then refuses tangents,
    which the bare op would drop."""
    if forward_ad._current_level >= 0:
        return True
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


class _Routed(torch.autograd.Function):
    """The ops forward and backward of a backend as one differentiable node. Arguments: the 9 inputs that may get a
    gradient, the base layer's output, and all else as one, for every argument of a node costs time: the backend's name,
    forward's 6 other tensors and 13 numbers, and what it shall save."""

    @staticmethod
    def forward(*args: Any) -> Any:
        *inputs, base, (where, others, numbers, save) = args
        return ops.run(ops.BACKENDS[where].ops.forward, *inputs, *others, base, *numbers, save)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, t, state, kept = output
        ctx.mark_non_differentiable(t, state, kept)
        ctx.set_materialize_grads(False)
        ctx.where, others, ctx.numbers, _ = inputs[10]
        ctx.save_for_backward(t, state, kept, *inputs[:9], *others)

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, *unused: Any) -> Any:
        if dout is None:
            return (None,) * 11
        needs = ctx.needs_input_grad
        gradients: Sequence[Tensor | None] = (None,) * 9
        if any(needs[:9]):
            t, state, kept, *tensors = ctx.saved_tensors
            arguments = (_bits(needs[:9]), dout.contiguous(), t, state, kept, *tensors, *ctx.numbers)
            gradients = _needed(_once(ops.BACKENDS[ctx.where].ops.backward, *arguments), needs[:9])
        return (*gradients, dout if needs[9] else None, None)


class _Encode(torch.autograd.Function):
    """The ops encode and encode_backward of a backend as one differentiable node; returns the state. Arguments: y, C,
    b_C, and all else as one: the backend's name, the mask and 4 numbers."""

    @staticmethod
    def forward(*args: Any) -> Any:
        *inputs, (where, mask, numbers) = args
        return ops.run(ops.BACKENDS[where].ops.encode, *inputs, mask, *numbers, True)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.where, mask, ctx.numbers = inputs[3]
        ctx.save_for_backward(output[1], *inputs[:3], mask)

    @staticmethod
    def backward(ctx: Any, dstate: Tensor | None, *unused: Any) -> Any:
        if dstate is None:
            return (None,) * 4
        needs = ctx.needs_input_grad[:3]
        arguments = (_bits(needs), dstate.contiguous(), *ctx.saved_tensors, *ctx.numbers)
        gradients = _once(ops.BACKENDS[ctx.where].ops.encode_backward, *arguments)
        return (*_needed(gradients, needs), None)


class _Once(torch.autograd.Function):
    """A backward op where its own derivative is recorded (create_graph, torch.func.grad): asking for that one raises.
    So does a tangent (forward-mode AD), which the op would drop.

    The op's own formula raises too, but torch.func takes no function without setup_context, even if it is never run.
    """

    @staticmethod
    def forward(op: Any, *args: Any) -> Any:
        return ops.run(op, *args)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return ops.refuse_gradient(ctx, *gradients)


def _once(op: Any, *args: Any) -> Any:
    if torch.is_grad_enabled() or forward_ad._current_level >= 0:
        return _Once.apply(op, *args)  # type: ignore[no-untyped-call]
    return ops.run(op, *args)


def _record(node: type[torch.autograd.Function], *args: Any) -> Any:
    """``node.apply(*args)`` without looking for default arguments; what transforms need, only where one is active."""
    if ops.untouched():
        # A tensor that outlived its transform stands for the one inside, whose gradient would be lost.
        args = unwrap_dead_wrappers(args)
        return super(torch.autograd.Function, node).apply(*args)  # type: ignore[misc]
    return node.apply(*args)  # type: ignore[no-untyped-call]


def _bits(needs: Sequence[bool]) -> int:
    """The ops take the wanted gradients as one number, bit i for input i."""
    return sum(1 << i for i, need in enumerate(needs) if need)


def _needed(gradients: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor | None]:
    """The ops return an empty tensor for a gradient nobody asked for; autograd wants None."""
    return [g if need else None for g, need in zip(gradients, needs, strict=True)]
