"""Linear layers of any make, as the layers that wrap them see them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from . import functional


def is_conv1d(module: nn.Module) -> bool:
    """Whether ``module`` is exactly transformers' Conv1D (weight [in, out]), without importing transformers."""
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"


def linear_features(module: nn.Module) -> tuple[int, int]:
    """(in, out) of a linear layer of any make; TypeError if it does not say."""
    if is_conv1d(module):
        rows, columns = module.weight.shape  # type: ignore[misc]
        return int(rows), int(columns)
    try:
        return int(module.in_features), int(module.out_features)  # type: ignore[arg-type]
    except AttributeError:
        raise TypeError(f"base_layer must have in_features and out_features, got {type(module).__name__}") from None


def parameter_options(base_layer: nn.Module) -> dict[str, Any]:
    """Device and dtype of the adapter's parameters: the base weight's, but float32 below single precision."""
    tensor = getattr(base_layer, "weight", None)
    if not isinstance(tensor, Tensor):
        tensor = next((t for t in (*base_layer.parameters(), *base_layer.buffers())), None)
    wide = tensor is not None and tensor.dtype == torch.float64
    device = None if tensor is None else tensor.device
    if tensor is not None and tensor.is_meta:
        device = _offloaded_to(base_layer) or device
    return {"device": device, "dtype": torch.float64 if wide else torch.float32}


def _offloaded_to(module: nn.Module) -> torch.device | None:
    """Where accelerate brings the weights of an offloaded module to run it; between calls they are on "meta"."""
    for part in module.modules():
        hook = part.__dict__.get("_hf_hook")
        for single in getattr(hook, "hooks", (hook,)):
            device = getattr(single, "execution_device", None)
            if device is not None:
                return torch.device(device)
    return None


def may_read_weight(base: nn.Module, x: Tensor) -> bool:
    """Whether computing from ``base.weight`` is the same as calling ``base(x)``.

    Only for an untouched nn.Linear or Conv1D: no hook of its own or global, no replaced forward, no parametrisation, a
    plain dense weight where x is and in the dtype that is computed in. Everything else (FSDP, offload hooks, quantised
    or subclassed layers, autocast's cached casts) wants to be called.
    """
    if type(base) is not nn.Linear and not is_conv1d(base):
        return False
    own, parameters = base.__dict__, base._parameters
    weight = parameters.get("weight")
    if (
        weight is None
        or "bias" not in parameters
        or patched(base)
        or own.get("parametrizations") is not None
        or hooked(base)
    ):
        return False
    bias, device = parameters["bias"], x.device
    return (
        dense(weight)
        and weight.device == device
        and (bias is None or (dense(bias) and bias.device == device))
        and weight.dtype == functional.compute_dtype(x)
    )


def patched(base: nn.Module) -> bool:
    """Whether a call of an nn.Linear or Conv1D runs another forward than the one its class was written with."""
    kind = type(base)
    if "forward" in base.__dict__:
        return True
    if kind is nn.Linear:
        return nn.Linear.forward is not _LINEAR_FORWARD
    return getattr(kind.forward, "__globals__", {}).get("__name__") != kind.__module__


def hooked(base: nn.Module) -> bool:
    """Whether a call of ``base`` runs hooks: its own, those of all modules, or accelerate's."""
    return bool(
        base._forward_hooks
        or base._forward_pre_hooks
        or base._backward_hooks
        or base._backward_pre_hooks
        or base.__dict__.get("_hf_hook")
        or any(_GLOBAL_HOOKS)
    )


def dense(tensor: Any) -> bool:
    """A plain tensor whose memory holds the values."""
    plain = type(tensor) in (nn.Parameter, Tensor)
    return plain and tensor.layout == torch.strided and not tensor.is_meta


_LINEAR_FORWARD = nn.Linear.forward
_GLOBAL_HOOKS = (
    torch_module._global_forward_hooks,
    torch_module._global_forward_pre_hooks,
    torch_module._global_backward_hooks,
    torch_module._global_backward_pre_hooks,
)
