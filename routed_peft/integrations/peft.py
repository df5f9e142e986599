"""The PEFT tuner: routed LoRA as an adapter type of Hugging Face's PEFT (>= 0.20).

    from routed_peft.integrations import peft as routed_peft_tuner
    routed_peft_tuner.register()
    model = peft.get_peft_model(model, routed_peft_tuner.RoutedPeftConfig(target_modules=["q_proj"], routing="gram"))

A type of its own and not a subclass of PEFT's LoRA: whoever loads such an adapter without ``register()`` gets an error,
never a plain LoRA. For the same reason no name in a file holds ``lora_``, which other loaders look for.

The layers are :class:`routed_peft.modules.LowRankUpdate`; which modules are adapted, and how the condition gets there,
is decided by the same code as for ``attach``.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

try:
    import peft
    from peft.config import PeftConfig
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
    from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper
    from peft.utils.peft_types import PeftType, register_peft_method
except ImportError as error:
    raise ImportError("routed_peft.integrations.peft needs peft >= 0.20: pip install 'peft>=0.20'") from error

from ..base_layers import linear_features
from ..config import ALL_LINEAR, RoutedLoRAConfig
from ..delivery import Delivered, Slot
from ..errors import ConditionShapeError, RoutedPeftError, UnsupportedError
from ..modules import LowRankUpdate, RoutedLayer, no_merge
from ..routes import one_of
from ..state import ConditionState
from ..surgery import Wiring, choose
from ..targets import is_linear

METHOD = "rpeft"  # the type's name; transformers takes it for the prefix, too
PREFIX = METHOD + "_"  # of what an adapter calls its own in a model
BASE = "__base__"  # PEFT's name for no adapter, among ``adapter_names``
_WIRING = "_routed_peft_wiring"  # what hangs on the base model, whoever injected the first adapter


@dataclass(kw_only=True)
class RoutedPeftConfig(PeftConfig, RoutedLoRAConfig):  # type: ignore[misc]
    """Routed LoRA for PEFT: what :class:`routed_peft.RoutedLoRAConfig` takes, and PEFT's own.

    Attributes:
        bias: "none", "all" or "rpeft_only" (of the adapted layers): which biases of the base model train too.
        layers_to_transform: numbers of the layers to adapt, where ``target_modules`` is a list.
        layers_pattern: the name before the number, where that is not clear.

    The others as RoutedLoRAConfig: target_modules, exclude_modules, r, routing, condition_features, condition_pool,
    condition_scale, missing, rank_pattern, modules_to_save, init, tap, format_version, lora_alpha, condition_source,
    lora_dropout, condition_dropout, use_rslora, out_slices, route_across_slices, alpha_pattern; and as PeftConfig:
    task_type, inference_mode, base_model_name_or_path, revision.

    Raises:
        RoutedPeftError: :func:`register` was not called.
        UnsupportedError: a ``bias`` that this version of PEFT would train and not save.
        ValueError: a value out of range.
    """

    bias: str = "none"
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None

    def __post_init__(self) -> None:
        PeftConfig.__post_init__(self)
        RoutedLoRAConfig.__post_init__(self)
        one_of("bias", self.bias, ("none", "all", PREFIX + "only"))
        if self.bias != "none" and not hasattr(BaseTuner, "_get_learnable_bias_state_dict"):
            raise UnsupportedError(
                f"bias={self.bias!r}: peft {peft.__version__} trains these biases but does not save them for a tuner "
                "of another library; it takes peft >= 0.21"
            )
        if METHOD.upper() not in PeftType.__members__:
            raise RoutedPeftError("call routed_peft.integrations.peft.register() first")
        self.peft_type = PeftType(METHOD.upper())


# ------------------------------------------------------------------------------------------------ layers
class RoutedPeftUpdate(LowRankUpdate):
    """One adapter's update of a layer. The parameters are A, B and C of the formula."""

    parameter_names = ("matrix_A", "matrix_B", "matrix_C")  # neither "lora_" nor the prefix may be in them

    def forward(self, base: Callable[[], nn.Module] | Tensor, x: Tensor) -> Tensor:
        """As :meth:`LowRankUpdate.add_to`; a base layer is given as a function that returns it.

        For accelerate's offload hooks move what a call is given: modules, too, but no functions.
        """
        return self.add_to(base if isinstance(base, Tensor) else base(), x)


class RoutedPeftLayer(nn.Module, BaseTunerLayer):  # type: ignore[misc]
    """A linear layer with the updates of several adapters, of which the active ones are added to its output."""

    adapter_layer_names = (PREFIX + "update",)
    other_param_names = ()
    rpeft_update: nn.ModuleDict
    base_layer: nn.Module
    active_adapters: list[str]  # like the next two, the base class's
    set_adapter: Callable[..., None]
    _move_adapter_to_device_of_base_layer: Callable[[str], None]

    def __init__(self, base_layer: nn.Module, adapter_name: str) -> None:
        super().__init__()
        self.in_features, self.out_features = linear_features(base_layer)
        self.base_layer = base_layer
        self.rpeft_update = nn.ModuleDict()
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self._active_adapter = adapter_name

    def add_adapter(self, adapter_name: str, config: RoutedPeftConfig, name: str, slot: Slot) -> None:
        """Give the layer at path ``name`` a fresh update that reads its condition from ``slot``."""
        update = RoutedPeftUpdate(self.base_layer, **config.layer_options(name))
        if config.init != "kaiming":
            update.reset_parameters(config.init)
        update.name, update.slot = f"{name}.{PREFIX}update.{adapter_name}", slot
        update.training = self.training = self.base_layer.training
        self.rpeft_update[adapter_name] = update
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, x: Tensor, *, adapter_names: list[str] | None = None) -> Tensor:
        """The base layer's output for x [B, N, in] or [B·N, in] plus the updates of the active adapters.

        ``adapter_names`` names an adapter for each of the B samples instead, "__base__" for none.
        """
        if self.disable_adapters:
            return self.base_layer(x)  # type: ignore[no-any-return]
        if adapter_names is not None:
            return self._by_sample(x, adapter_names)
        out: Tensor | None = None
        for name in self.active_adapters:
            if name in self.rpeft_update:
                out = self.rpeft_update[name](self._base if out is None else out, x)
        return self.base_layer(x) if out is None else out

    def _base(self) -> nn.Module:
        return self.base_layer

    def _by_sample(self, x: Tensor, names: list[str]) -> Tensor:
        samples = len(names)
        if (x.shape[0] != samples) if x.dim() > 2 else (samples == 0 or x.shape[0] % samples):
            raise ConditionShapeError(
                f"input batch {x.shape[0]} does not match adapter_names, of which there are {samples}"
            )
        base: Tensor = self.base_layer(x)
        out = base.clone() if x.dim() > 2 else base.reshape(samples, -1, base.shape[-1]).clone()
        x = x if x.dim() > 2 else x.reshape(samples, -1, x.shape[-1])
        for name in sorted(set(names) - {BASE}):
            if name not in self.rpeft_update:
                continue
            update: Any = self.rpeft_update[name]
            rows = torch.tensor([row for row, each in enumerate(names) if each == name], device=x.device)
            given = update.slot.read(update)
            with update.slot.holding(None if given is None else _of_rows(update.label, given, rows, samples)):
                out[rows] = update(out[rows], x[rows])
        return out.reshape(base.shape)

    def bake(
        self, condition: Tensor | ConditionState, condition_mask: Tensor | None = None, adapter_name: str | None = None
    ) -> nn.Linear:
        """As :meth:`routed_peft.RoutedLoRA.bake`, with ``adapter_name``, or else the active adapter."""
        names = [name for name in self.active_adapters if name in self.rpeft_update]
        if adapter_name is None and len(names) != 1:
            raise ValueError(f"bake takes one adapter, active are {names}; give adapter_name")
        update: Any = self.rpeft_update[names[0] if adapter_name is None else adapter_name]
        return update.bake_into(self.base_layer, condition, condition_mask)  # type: ignore[no-any-return]

    def merge(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raises: there is no weight without a condition."""
        no_merge()

    def unmerge(self) -> NoReturn:
        """Raises: nothing was merged."""
        no_merge()


def _of_rows(label: str, given: Delivered, rows: Tensor, samples: int) -> Delivered:
    """What is left of a condition for ``samples`` inputs when only ``rows`` [K] of these are looked at."""
    y, index, mask = given.condition, given.index, given.mask

    def own(what: str, count: int) -> Tensor:
        # as the layers take it: beams are k rows in a row for each condition
        if not count or samples % count or (torch.is_grad_enabled() and samples != count):
            raise ConditionShapeError(f"{label}: input batch {samples} does not match {what} {count}")
        return rows // (samples // count)

    if y is not None:
        count = (y.tensor if isinstance(y, ConditionState) else y).shape[0]
        if index is None:
            index = own("condition batch", count)
        elif index.shape[0] != samples:
            raise ConditionShapeError(f"{label}: input batch {samples} does not match condition_index {index.shape[0]}")
        else:
            index = index[rows]
    elif mask is not None:
        mask = mask[own("mask batch", mask.shape[0])]
    elif index is not None and len(rows) != samples:
        raise UnsupportedError(
            f"{label}: an in-sequence condition with several adapter_names cannot follow rows that generate reorders "
            "(beams); generate with one adapter at a time, or greedily"
        )
    valid = given.input_mask
    if valid is not None:
        valid = valid[own("input mask batch", valid.shape[0])]
    return given._replace(index=index, mask=mask, input_mask=valid)


# ------------------------------------------------------------------------------------------------ the tuner
class RoutedPeftModel(BaseTuner):  # type: ignore[misc]
    """The tuner, which ``peft.get_peft_model`` makes; ``model(..., routed_condition=y)`` as after ``attach``."""

    prefix = PREFIX
    tuner_layer_cls = RoutedPeftLayer
    target_module_mapping: dict[str, list[str]] = {}  # target_modules is always given

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The base model's call, and not its forward (as in peft 0.20): the condition comes by its hooks."""
        return self.model(*args, **kwargs)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """PEFT's, and the hooks that bring the condition, which all adapters of a model share."""
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        if _WIRING not in model.__dict__:
            setattr(model, _WIRING, Wiring(model, self._slot, self._tap))

    def _prepare_model(self, peft_config: RoutedPeftConfig, model: nn.Module) -> None:
        """Choose the modules, before anything is changed."""
        layers = {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
        wrappers = [name for name, module in model.named_modules() if isinstance(module, AuxiliaryTrainingWrapper)]
        inside = tuple(f"{name}." for name in (*layers, *wrappers))
        outside = {name: m for name, m in model.named_modules() if name and not name.startswith(inside)}
        for name, module in outside.items():
            if isinstance(module, RoutedLayer):
                raise RoutedPeftError(f"the model already holds a routed layer, '{name}'; detach the model first")
        # PEFT's choice, with its modules_to_save and layers_to_transform; what is excluded is for ``choose`` to tell.
        selecting = copy.copy(peft_config)
        selecting.exclude_modules = None
        if peft_config.target_modules == ALL_LINEAR:
            selecting.target_modules = ".*"
            outside = {name: module for name, module in outside.items() if is_linear(module)}
        selects = partial(super()._check_target_module_exists, selecting)
        hits = {name: module for name, module in outside.items() if selects(name)}
        for name in hits:
            if name in layers and not isinstance(layers[name], RoutedPeftLayer):
                kind = type(layers[name]).__name__
                raise UnsupportedError(f"'{name}' already has an adapter of another type, {kind}")
        chosen, _, tap = choose(model, peft_config, [], hits)
        wiring = model.__dict__.get(_WIRING)
        if wiring is not None and _path(wiring.tap) != _path(tap):
            raise UnsupportedError(
                f"the adapters of a model share one tap: that of the others is {_path(wiring.tap)!r}, "
                f"tap={peft_config.tap!r} is {_path(tap)!r}"
            )
        self._chosen, self._tap, self._slot = set(chosen), tap, Slot() if wiring is None else wiring.slot
        if peft_config.target_modules == ALL_LINEAR:
            # PEFT would take the towers and projectors as well. Whole paths: a list's names match any path's end.
            peft_config.target_modules = "|".join(map(re.escape, chosen))

    def _check_target_module_exists(self, peft_config: RoutedPeftConfig, key: str) -> Any:
        found = super()._check_target_module_exists(peft_config, key)
        return found if not found or key in self._chosen else False

    def _create_and_replace(
        self, peft_config: RoutedPeftConfig, adapter_name: str, target: nn.Module, target_name: str, parent: nn.Module,
        current_key: str, **kwargs: Any,
    ) -> None:  # fmt: skip
        if isinstance(target, RoutedPeftLayer):
            layer = target
        else:
            layer = RoutedPeftLayer(target, adapter_name)
            self._replace_module(parent, target_name, layer, target)
        layer.add_adapter(adapter_name, peft_config, current_key, self._slot)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """PEFT's own looks for a weight to take the device from, which a quantised base may not have."""
        setattr(parent, child_name, new_module)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Adapters are float32 on a float16 or bfloat16 base, unless the user wants the base's dtype."""
        if not autocast_adapter_dtype:
            for layer in self.modules():
                if isinstance(layer, RoutedPeftLayer):
                    layer._move_adapter_to_device_of_base_layer(adapter_name)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """While a call of the PeftModel runs: hand its ``adapter_names`` to the layers."""
        names = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
        known = {name for layer in self.modules() if isinstance(layer, RoutedPeftLayer) for name in layer.rpeft_update}
        unknown = sorted(set(names) - known - {BASE})
        if unknown:
            raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}")
        beams = kwargs.get("num_beams") or 1
        repeated = [name for name in names for _ in range(beams)]
        # An encoder runs once for each sample, before generate makes beams of it.
        whole = getattr(getattr(self.model, "config", None), "is_encoder_decoder", False)
        encoder = set(self.model.get_encoder().modules()) if whole else set()
        handles = []
        try:
            for module in self.modules():
                if isinstance(module, (RoutedPeftLayer, AuxiliaryTrainingWrapper)):
                    own = names if module in encoder else repeated
                    hook = partial(_name_adapters, adapter_names=own)
                    handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _check_merge_allowed(self) -> NoReturn:
        no_merge()

    def merge_adapter(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raises: there is no weight without a condition."""
        no_merge()

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raises: a sum of routed updates is not the update of summed matrices."""
        raise UnsupportedError("no combination of routed adapters is defined: the route is a product of A and C")

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> Any:
        model = super()._unload_and_optionally_merge(*args, **kwargs)
        wiring = model.__dict__.pop(_WIRING, None)
        if wiring is not None:
            wiring.remove()
        return model


def _path(tap: Any) -> str | None:
    return None if tap is None else tap.path


def _name_adapters(module: nn.Module, args: Any, kwargs: dict[str, Any], *, adapter_names: list[str]) -> Any:
    return args, {**kwargs, "adapter_names": adapter_names}


# ------------------------------------------------------------------------------------------------ registration
def register() -> None:
    """Make the tuner known to PEFT, in this process; again changes nothing. Needed to load an adapter, too.

    Raises:
        ImportError: peft is older than 0.20.
    """
    if tuple(map(int, peft.__version__.split(".")[:2])) < (0, 20):
        raise ImportError(f"routed_peft needs peft >= 0.20, found {peft.__version__}")
    kind = _member(PeftType, METHOD.upper())
    if PEFT_TYPE_TO_TUNER_MAPPING.get(kind) is not RoutedPeftModel:
        register_peft_method(name=METHOD, config_cls=RoutedPeftConfig, model_cls=RoutedPeftModel, prefix=PREFIX)


def _member(enumeration: Any, name: str) -> Any:
    """The member of that name and value, made if there is none: PEFT's list of types has no place to add one."""
    if name not in enumeration.__members__:
        member = str.__new__(enumeration, name)
        member._name_ = member._value_ = name
        member._sort_order_ = len(enumeration.__members__)
        member.__objclass__ = enumeration
        type.__setattr__(enumeration, name, member)
        enumeration._member_names_.append(name)
        enumeration._member_map_[name] = enumeration._value2member_map_[name] = member
    return enumeration(name)
