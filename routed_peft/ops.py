"""The dispatcher ops ``torch.ops.routed_peft.*``: the C++ library, its shapes for tracing, and its gradient guard.

Forward and backward are one op call each. The ops carry an autograd formula that raises: the gradients live in
``functional``, and a direct call on tensors that require grad, or a second derivative, must not lose one silently.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .errors import UnsupportedError
from .routes import ACTIVATIONS, ROUTES, SOURCES, state_kind

_CODE_OF = {route.code: name for name, route in ROUTES.items()}
_POOL_OF = {0: "none", 1: "mean", 2: "first"}
RANK_ONE = ("expand", "gram", "ones")  # with a pooled condition: Z = c vᵀ for one number c a row


def _built_with() -> Any:
    """What setup.py noted down, or None where it was not run."""
    try:
        return importlib.import_module("._built_with", __package__)
    except ImportError:
        return None


def _load() -> tuple[Any, str]:
    """The extension module, or None and the reason why it is not there."""
    try:
        return importlib.import_module("._C", __package__), ""
    except ImportError as error:
        built = _built_with()
        if built is None or isinstance(error, ModuleNotFoundError):
            return None, f"the C++ extension was not built, or its file is gone ({error})"
        return None, (
            f"the C++ extension was built for torch {built.TORCH} with CUDA {built.CUDA}, and this is torch "
            f"{torch.__version__} with CUDA {torch.version.cuda}; reinstall routed_peft ({error})"
        )


extension, why_missing = _load()
_built: dict[str, Any] = {} if extension is None else extension.build_info()

# What the CUDA kernels take (csrc/kernels/launch.h).
KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
CPU_DTYPES = (*KERNEL_DTYPES, torch.float64)
KERNEL_WIDTH, KERNEL_SLICES = 256, 16
KERNEL_CAPABILITY = (8, 0)


@dataclass(frozen=True)
class Backend:
    """Who computes, other than the definition.

    Attributes:
        device: the type of device its tensors lie on.
        ops: where its ops are.
        kernels: these are the CUDA kernels, with their limits.
    """

    device: str
    ops: Any
    kernels: bool


BACKENDS = {
    "cpu": Backend("cpu", torch.ops.routed_peft, False),
    "cuda": Backend("cuda", torch.ops.routed_peft, True),
}


def build_info() -> dict[str, Any]:
    """What was built: versions of routed_peft's extension, compiler, instruction sets, CUDA and kernel limits."""
    if extension is None:
        return {"extension": False, "reason": why_missing}
    info = {"extension": True, **extension.build_info()}
    if info["cuda"]:
        built = _built_with()
        info["cuda_version"], info["cuda_archs"] = built.CUDA, built.CUDA_ARCHS
        info["cuda_widths"] = (1, KERNEL_WIDTH)
        info["cuda_slices"] = (1, KERNEL_SLICES)
        info["cuda_dtypes"] = tuple(map(_short, KERNEL_DTYPES))
        info["cuda_by_torch"] = {"base layer": "the vendor's products"}
    return info


def supports(routing: str, width: int, dtype: torch.dtype, device: torch.device | str) -> tuple[bool, str]:
    """Whether the C++ ops serve ``routing`` at bottleneck width ``width``, and the reason if they do not.

    Args:
        routing: a route's name.
        width: bottleneck width R of one group (the rank, times the number of slices where those are mixed).
        dtype: dtype of the layer's input.
        device: where the input lies.
    """
    if routing not in ROUTES:
        return False, f"unknown routing {routing!r}"
    if width < 1:
        return False, f"width {width} is not positive"
    device = torch.device(device)
    reason = _refusal("cpu" if device.type == "meta" else device.type, routing, width, 1, dtype, device)
    return not reason, reason


def _refusal(where: str, routing: str, width: int, slices: int, dtype: torch.dtype, device: torch.device) -> str:
    """Why backend ``where`` cannot serve such a call; empty if it can."""
    if routing == "gram_reshape":
        return "routing 'gram_reshape' exists in the reference backend only"
    if extension is None:
        return why_missing
    if where not in BACKENDS:
        return f"this version has no kernels for {where}"
    if not BACKENDS[where].kernels:
        return "" if dtype in CPU_DTYPES else f"dtype {dtype} is not a floating-point type the ops know"
    if where == "cuda" and not _built["cuda"]:
        return "the C++ extension was built without CUDA"
    if dtype not in KERNEL_DTYPES:
        supported = ", ".join(map(_short, KERNEL_DTYPES))
        return f"dtype {_short(dtype)} is not supported by the CUDA kernels (supported: {supported})"
    if width > KERNEL_WIDTH:
        return f"width {width} is not supported by the CUDA kernels for {_short(dtype)} (supported: 1..{KERNEL_WIDTH})"
    if slices > KERNEL_SLICES:
        return f"{slices} output slices are not supported by the CUDA kernels (supported: 1..{KERNEL_SLICES})"
    return "" if where != "cuda" or torch.compiler.is_compiling() else _old_gpu(device)


@functools.cache
def _old_gpu(device: torch.device) -> str:
    found = torch.cuda.get_device_capability(device) if torch.cuda.is_available() else KERNEL_CAPABILITY
    if found >= KERNEL_CAPABILITY:
        return ""
    needed, has = (".".join(map(str, version)) for version in (KERNEL_CAPABILITY, found))
    return f"routed_peft's CUDA kernels need compute capability {needed} or newer, this GPU has {has}"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


_told: set[str] = set()


def resolve_backend(
    backend: str, routing: str, width: int, slices: int, dtype: torch.dtype, device: torch.device
) -> str:
    """Who computes this call: a name in BACKENDS or "reference". Falling back under "auto" is told once."""
    if backend == "reference":
        return backend
    kind = device.type
    meta = kind == "meta"  # shapes alone, which are the same everywhere
    where = backend if backend != "auto" else "cpu" if meta else kind
    if backend != "auto" and not meta and kind != BACKENDS[backend].device:
        raise UnsupportedError(f"backend={backend!r} was asked for, and the input is on {device}; use backend='auto'")
    reason = _refusal("cpu" if meta else where, routing, width, slices, dtype, device)
    if not reason:
        return where
    if backend != "auto":
        raise UnsupportedError(f"backend={backend!r}: {reason}; use backend='auto'")
    if reason not in _told and not torch.compiler.is_compiling():
        _told.add(reason)
        warnings.warn(f"routed_peft uses the plain torch reference backend: {reason}", stacklevel=4)
    return "reference"


def _accumulate(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def state_shape(
    y: Tensor, width: int, cu_seqlens: Tensor | None, routing: int, pool: int, groups: int
) -> tuple[str, list[Any]]:
    """The kind ("vector", "matrix" or "tokens") and the shape of the state of a condition y."""
    if cu_seqlens is not None:
        conditions, single = cu_seqlens.shape[0] - 1, False
    else:
        conditions, single = y.shape[0], y.dim() == 2 or bool(y.shape[1] == 1)
    kind = state_kind(_CODE_OF[routing], _POOL_OF[pool], single)
    if kind == "vector":
        return kind, [conditions, width]
    if kind == "matrix":
        return kind, [conditions, width, width // groups]
    return kind, [*y.shape[:-1], width]


def _through_state(samples: int, conditions: int, rows: int, tokens: int, group_width: int) -> bool:
    """Whether gram routes go through S = VᵀV, by ``plan::gram_order`` (csrc/kernels/plan.h), or through V."""
    through_s = conditions * group_width * (tokens + rows + 32 * conditions)
    return bool(through_s <= 2 * tokens * (rows + 8 * samples))


def _forward_fake(
    x: Tensor,
    A: Tensor,
    B: Tensor,
    condition: Tensor | None,
    C: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    b_down: Tensor | None,
    b_C: Tensor | None,
    mask: Tensor | None,
    index: Tensor | None,
    input_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    condition_cu_seqlens: Tensor | None,
    seed: Tensor | None,
    base: Tensor | None,
    samples: int,
    routing: int,
    source: int,
    pool: int,
    scale: int,
    groups: int,
    slices: list[int],
    out_features: int,
    scaling: float,
    dropout: float,
    condition_dropout: float,
    activation: int,
    residual: bool,
    save: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    out = x.new_empty([*x.shape[:-1], out_features])
    nothing = x.new_empty([0])
    if not save:
        return out, nothing, nothing.clone(), nothing.clone()
    rows, width = x.numel() // x.shape[-1], A.shape[0]
    batch = samples if cu_seqlens is None else cu_seqlens.shape[0] - 1
    state, kept, kind = nothing.clone(), nothing.clone(), "none"
    if source == SOURCES["state"]:
        assert condition is not None
        kind, shape = "vector" if condition.dim() == 2 else "other", [*condition.shape]
    elif source != SOURCES["none"]:
        y, cu = condition, condition_cu_seqlens
        if source == SOURCES["in_sequence"]:
            y, cu = x, cu_seqlens
            if cu is None:
                y = x.new_empty([samples, rows // samples if samples else 0, x.shape[-1]])
        assert y is not None
        kind, shape = state_shape(y, width, cu, routing, pool, groups)
        through_v = False
        if save == 2 and kind == "vector":
            kept = y.new_empty([shape[0], y.shape[-1]], dtype=_accumulate(x.dtype))
        elif save == 2 and kind == "matrix" and source == SOURCES["tokens"]:
            tokens = y.numel() // y.shape[-1]
            kept = y.new_empty([tokens, width])
            through_v = not _through_state(batch, shape[0], rows, tokens, width // groups)
        if not through_v:
            state = y.new_empty(shape, dtype=_accumulate(x.dtype))
    rank_one = _CODE_OF[routing] in RANK_ONE and activation == ACTIVATIONS["none"] and b_down is None
    if kind == "vector" and rank_one and (index is None or shape[0] == batch or shape[0] <= rows):  # plan.h: rank_one
        return out, x.new_empty([rows, groups], dtype=_accumulate(x.dtype)), state, kept
    return out, x.new_empty([rows, width]), state, kept


def _infer_fake(x: Tensor, *arguments: Any) -> Tensor:
    return x.new_empty([*x.shape[:-1], arguments[10]])


def _gradients_fake(needs: int, *inputs: Tensor | None) -> tuple[Tensor, ...]:
    """One gradient for each input, like it; empty where bit i of ``needs`` does not ask for it."""
    like = next(t for t in inputs if t is not None)
    return tuple(
        torch.empty_like(t, memory_format=torch.contiguous_format)
        if needs >> i & 1 and t is not None
        else like.new_empty([0])
        for i, t in enumerate(inputs)
    )


def _backward_fake(
    needs: int, dout: Tensor, T: Tensor, state: Tensor, kept: Tensor, *inputs: Any
) -> tuple[Tensor, ...]:
    x, a, b, condition, c, weight, bias, b_down, b_c = inputs[:9]
    return _gradients_fake(needs, x, a, b, condition, c, weight, bias, b_down, b_c)


def _encode_fake(
    y: Tensor,
    C: Tensor,
    b_C: Tensor | None,
    mask: Tensor | None,
    routing: int,
    pool: int,
    scale: int,
    groups: int,
    save: bool,
) -> tuple[Tensor, Tensor]:
    kind, shape = state_shape(y, C.shape[0], None, routing, pool, groups)
    acc = _accumulate(y.dtype)
    if save and kind == "vector":
        kept = y.new_empty([shape[0], y.shape[-1]], dtype=acc)
    elif save and kind == "matrix":
        kept = y.new_empty([y.numel() // y.shape[-1], C.shape[0]])
    else:
        kept = y.new_empty([0])
    return y.new_empty(shape, dtype=acc), kept


def _encode_backward_fake(needs: int, dstate: Tensor, kept: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    return _gradients_fake(needs, *inputs[:3])


def _on_one_device(fake: Callable[..., Any]) -> Callable[..., Any]:
    """``fake``, but for tensors on several devices: one on "meta" would turn a real call into a fake one."""

    @functools.wraps(fake)
    def checked(*args: Any) -> Any:
        devices = {str(t.device) for t in args if isinstance(t, Tensor)}
        if len(devices) > 1:
            raise RuntimeError(f"routed_peft ops take tensors of one device, got {', '.join(sorted(devices))}")
        return fake(*args)

    return checked


def refuse_gradient(ctx: Any, *gradients: Any) -> Any:
    """The derivative of the ops: an error, never a silent zero."""
    raise RuntimeError(
        "torch.ops.routed_peft.* has no derivative of its own (and its backward no second one): "
        "call routed_peft.functional, which differentiates once"
    )


_BelowAutograd: Any = getattr(torch._C, "_AutoDispatchBelowAutograd", None)


def untouched() -> bool:
    """Whether nothing in torch looks on at this call: no tracer, no transform of torch.func, no dispatch mode."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._is_tracing()
    )


def run(op: Any, *args: Any, alone: bool | None = None) -> Any:
    """``op(*args)``; where gradients are off, so that none can be lost, without the kernel that installs the formula.

    That is Python, and takes as long as a small call itself. ``alone`` is what ``untouched()`` said, if it was asked.
    """
    if torch.is_grad_enabled() or _BelowAutograd is None or not (untouched() if alone is None else alone):
        return op(*args)
    with _BelowAutograd():
        return op(*args)


def register(namespace: str) -> None:
    """Give the ops of ``namespace`` their shapes and the formula that raises."""
    for name, fake in (
        ("forward", _forward_fake),
        ("infer", _infer_fake),
        ("backward", _backward_fake),
        ("encode", _encode_fake),
        ("encode_backward", _encode_backward_fake),
    ):
        torch.library.register_fake(f"{namespace}::{name}", _on_one_device(fake))
        torch.library.register_autograd(f"{namespace}::{name}", refuse_gradient)


if extension is not None:
    register("routed_peft")
