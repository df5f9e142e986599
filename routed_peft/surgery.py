"""Putting routed layers into a model that exists: attach, detach, check, and the adapter's files."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn

from .base_layers import parameter_options
from .config import RoutedAdapterConfig, RoutedConfig, RoutedLoRAConfig
from .delivery import CallKeywords, Slot, unbind_checkpoints
from .errors import AdapterFileError, ConditionShapeError, RoutedPeftError
from .joint import JointLayers
from .modules import RoutedAdapter, RoutedLayer, RoutedLoRA
from .taps import Tap, find_tap
from .targets import modules_to_save, output_width, select

_OWN_GENERATE = {"blip-2", "instructblip"}  # models whose generate hands its arguments to their language model's
CONFIG_FILE, TENSOR_FILE = "routed_config.json", "routed_adapter.safetensors"


@dataclass(frozen=True)
class AttachReport:
    """What attach did.

    Attributes:
        names: paths of the adapted modules.
        skipped: path -> reason, of the modules that target_modules selects and that were left alone.
        tap: where the condition is tapped; None if it is given with each call.
    """

    names: list[str]
    skipped: dict[str, str]
    tap: str | None = None

    def __str__(self) -> str:
        tap = "" if self.tap is None else f"; condition: {self.tap}"
        lines = [f"{len(self.names)} modules adapted, {len(self.skipped)} skipped{tap}"]
        return "\n".join(lines + [f"  {name}: {reason}" for name, reason in self.skipped.items()])


@dataclass(frozen=True)
class CheckReport:
    """Which routed layers a call of the model ran.

    Attributes:
        ran: paths of the layers that ran.
        never_ran: paths of those that did not: their parameters would never train.
    """

    ran: list[str]
    never_ran: list[str]

    def __str__(self) -> str:
        text = f"{len(self.ran)} of {len(self.ran) + len(self.never_ran)} routed layers ran"
        return text + (f"; never ran: {', '.join(self.never_ran)}" if self.never_ran else "")


class Wiring:
    """What brings the condition of a model's call to the layers, through ``slot``: the call's keywords and a tap."""

    def __init__(self, model: nn.Module, slot: Slot, tap: Tap | None, join_conditions: bool = False) -> None:
        self.model, self.slot, self.tap = model, slot, tap
        self.keywords: list[CallKeywords] = []

        def joint(part: nn.Module) -> JointLayers | None:
            return JointLayers(part) if join_conditions else None

        try:
            if tap is not None:
                tap.install(slot, joint(model))
            self.keywords.append(CallKeywords(model, slot, joint(model)))  # after the tap's hooks, that run within
            for part in _called_by_generate(model):
                self.keywords.append(CallKeywords(part, slot, joint(part), inner=True))
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        """Hooks, methods and checkpoint functions as they were."""
        if self.tap is not None:
            self.tap.remove()
        for keywords in self.keywords:
            keywords.remove()
        unbind_checkpoints(self.model)


@dataclass
class _Attached:
    """What attach has to remember: it hangs on the model as ``_routed_peft``."""

    config: RoutedConfig
    report: AttachReport
    saved: list[str]  # paths of modules_to_save
    requires_grad: dict[str, bool]  # of every parameter, as attach found it
    wiring: Wiring


class AdaptedModule(nn.Module):
    """A module with a RoutedAdapter around its output: ``adapter(base(x))``, or in parallel ``base(x) + adapter(x)``.

    The base module is called as it was, with whatever arguments; its output is a tensor [..., d], or a tuple whose
    first item is one and whose others are passed on. Its public attributes can be read through this module.
    """

    def __init__(self, base_layer: nn.Module, adapter: RoutedAdapter) -> None:
        super().__init__()
        self.base_layer, self.adapter = base_layer, adapter

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_"):  # what accelerate, copy and others keep on a module, about that one alone
                raise
            return getattr(super().__getattr__("base_layer"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The base module's output, adapted; the adapter adds its input where it has the residual (sequential)."""
        out = self.base_layer(*args, **kwargs)
        first = out[0] if isinstance(out, tuple) else out
        if not isinstance(first, Tensor):
            raise ConditionShapeError(
                f"{self.adapter.label}: the module's output must be a tensor or a tuple that starts with one, "
                f"got {type(out).__name__}"
            )
        if self.adapter.residual:
            first = self.adapter(first)
        else:
            x = args[0] if args else kwargs.get("hidden_states")
            if not isinstance(x, Tensor):
                raise ConditionShapeError(
                    f"{self.adapter.label}: placement='parallel' needs the module's input as its first argument or as "
                    "hidden_states"
                )
            first = first + self.adapter(x).to(first.dtype)
        return (first, *out[1:]) if isinstance(out, tuple) else first


# ------------------------------------------------------------------------------------------------ attach and detach
def attach(
    model: nn.Module, config: RoutedConfig, tap: str | None = None, *, join_conditions: bool = False
) -> AttachReport:
    """Put routed layers around the modules that ``config`` selects, and freeze everything else.

    Trainable afterwards: the adapters and ``modules_to_save``. The model's own call and its ``generate`` then take
    ``routed_condition`` [B, M, d_c] or [B, d_c], ``routed_condition_mask`` [B, M], ``routed_condition_index`` [B] and
    ``routed_input_mask`` [B, N], as the arguments of :func:`condition`. A model that raises is left as it was.

    Args:
        model: any module; "all-linear", cross_gram and taps look at a transformers model's config.
        config: RoutedLoRAConfig or RoutedAdapterConfig.
        tap: replaces ``config.tap``, unless None: "auto", or the path of the module whose output is the condition.
            With "auto", modules that run before the tapped condition exists (a vision tower) are skipped; beside a
            path ``target_modules`` has to leave them out.
        join_conditions: project the condition for all layers in one product, which reads it once instead of once for
            each layer. The same within rounding, with gradients, checkpoints and generation. Layers join that agree in
            route, pooling, scale and rank and have no dropout on the condition; those that do not run in a call get
            zeros for a gradient, as all layers are projected at once. Not saved, not under torch.compile, and refused
            in training with sharded parameters (FSDP).

    Returns:
        What was adapted, and what was skipped for which reason.

    Raises:
        RoutedPeftError: nothing matched, or there are routed layers already.
        UnsupportedError: a module named in a ``target_modules`` list cannot be adapted, or there is no such tap for
            this model; the text says why.
    """
    # A copy: what is saved is what was attached, whatever the caller makes of the object afterwards.
    config = copy.deepcopy(config if tap is None else replace(config, tap=tap))
    held = next((name for name, module in model.named_modules() if isinstance(module, RoutedLayer)), None)
    if held is not None:
        raise RoutedPeftError(f"{type(model).__name__} already holds a routed layer, '{held}'; detach the model first")
    saved = modules_to_save(model, config)
    chosen, skipped, found = choose(model, config, saved)
    slot = Slot()
    layers: dict[int, nn.Module] = {}  # by base layer, which may be in the model more than once
    for name, module in chosen.items():
        if id(module) not in layers:
            layers[id(module)] = _build(model, name, module, config, slot)

    if found is not None and not found.in_sequence and config.routing != "none":
        _check_width(found, {name: layers[id(module)] for name, module in chosen.items()})

    before = {name: p.requires_grad for name, p in model.named_parameters(remove_duplicate=False)}
    report = AttachReport(list(chosen), skipped, None if found is None else found.description)
    wiring = Wiring(model, slot, found, join_conditions)
    model._routed_peft = _Attached(config, report, saved, before, wiring)  # type: ignore[assignment]
    try:
        model.requires_grad_(False)
        for name in saved:
            for p in model.get_submodule(name).parameters():
                p.requires_grad_(p.is_floating_point())
        for name, module in chosen.items():
            model.set_submodule(name, layers[id(module)])
    except BaseException:
        detach(model)
        raise
    return report


def choose(
    model: nn.Module, config: RoutedConfig, saved: list[str], hits: dict[str, nn.Module] | None = None
) -> tuple[dict[str, nn.Module], dict[str, str], Tap | None]:
    """As ``targets.select``, without the modules that run before the condition is tapped; and the tap."""
    chosen, skipped = select(model, config, saved, hits)
    found = find_tap(model, config.tap, getattr(config, "condition_source", "external") == "in_sequence")
    if found is not None:
        early = [name for name in chosen if not found.reaches(name)]
        skipped.update((name, f"it runs where the {found.description} is not known") for name in early)
        chosen = {name: module for name, module in chosen.items() if name not in early}
        if not chosen:
            raise RoutedPeftError(f"{len(early)} modules match, such as '{early[0]}', but {skipped[early[0]]}")
    return chosen, skipped, found


def detach(model: nn.Module) -> None:
    """Undo :func:`attach`: base layers, requires_grad flags, hooks, methods and checkpoint functions as they were.

    Weights that ``modules_to_save`` trained keep their values.

    Raises:
        RoutedPeftError: the model is not attached.
    """
    record = _record(model)
    for name in record.report.names:
        layer = model.get_submodule(name)
        if isinstance(layer, (RoutedLoRA, AdaptedModule)):  # else a shared parent, restored under its other name
            model.set_submodule(name, layer.base_layer)
    record.wiring.remove()
    del model._routed_peft
    for name, p in model.named_parameters(remove_duplicate=False):
        p.requires_grad_(record.requires_grad.get(name, p.requires_grad))


def check(model: nn.Module, *args: Any, **batch: Any) -> CheckReport:
    """Run ``model(*args, **batch)`` once, without gradients and in eval mode, and see which routed layers run.

    Give the condition as for any call, by ``with routed_peft.condition(model, y):`` around this one.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, RoutedLayer)}
    ran: set[nn.Module] = set()

    # Not by hooks: nn.TransformerEncoderLayer goes another way through its children if it sees hooks on them.
    def watched(layer: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        def note(*args: Any, **kwargs: Any) -> Any:
            ran.add(layer)
            return forward(*args, **kwargs)

        return note

    replaced = {layer: layer.__dict__.get("forward") for layer in layers.values()}
    training = [module for module in model.modules() if module.training]
    try:
        for layer in replaced:
            layer.__dict__["forward"] = watched(layer, layer.forward)
        model.eval()
        with torch.no_grad():
            model(*args, **batch)
    finally:
        for layer, forward in replaced.items():
            del layer.__dict__["forward"]
            if forward is not None:
                layer.__dict__["forward"] = forward
        for module in training:
            module.training = True
    names = {layer.name or name: layer in ran for name, layer in layers.items()}
    return CheckReport(
        [name for name, seen in names.items() if seen], [name for name, seen in names.items() if not seen]
    )


def _called_by_generate(model: nn.Module) -> list[nn.Module]:
    """The parts that ``generate`` calls with the model's arguments, without calling the model."""
    parts = [model.get_submodule("language_model")] if _model_type(model) in _OWN_GENERATE else []
    for whole in (model, *parts):
        get_encoder: Any = getattr(whole, "get_encoder", None)
        if get_encoder is not None and getattr(getattr(whole, "config", None), "is_encoder_decoder", False):
            parts.append(get_encoder())
    return [part for part in parts if part is not model]


def _record(model: nn.Module) -> _Attached:
    record = model.__dict__.get("_routed_peft")
    if record is None:
        inner: Any = getattr(model, "_orig_mod", None)
        if inner is not None and "_routed_peft" in inner.__dict__:
            raise RoutedPeftError(f"{type(model).__name__} is a compiled model; pass the one that was compiled")
        inner = getattr(model, "module", None)
        if isinstance(inner, nn.Module) and "_routed_peft" in inner.__dict__:
            raise RoutedPeftError(f"{type(model).__name__} is a wrapper of the attached model; pass its .module")
        own = "; a PeftModel has save_pretrained and from_pretrained" if hasattr(model, "peft_config") else ""
        raise RoutedPeftError(f"{type(model).__name__} has no attached adapter; call routed_peft.attach first{own}")
    return record  # type: ignore[no-any-return]


def _build(model: nn.Module, name: str, module: nn.Module, config: RoutedConfig, slot: Slot) -> nn.Module:
    """The layer that takes the place of ``module``."""
    layer: nn.Module
    routed: RoutedLoRA | RoutedAdapter
    if isinstance(config, RoutedLoRAConfig):
        layer = routed = RoutedLoRA(module, **config.layer_options(name))
    else:
        assert isinstance(config, RoutedAdapterConfig)
        width = output_width(model, name, module)
        assert width is not None
        routed = RoutedAdapter(width, **config.layer_options(name), **parameter_options(module))
        layer = AdaptedModule(module, routed)
    if config.init != "kaiming":
        routed.reset_parameters(config.init)
    routed.name, routed.slot = name, slot
    layer.training = routed.training = module.training
    return layer


def _check_width(tap: Tap, layers: dict[str, nn.Module]) -> None:
    """Raise if the condition that ``tap`` delivers is of another width than ``layers`` take."""
    width, others = tap.width, {}
    for name, layer in layers.items():
        routed = layer.adapter if isinstance(layer, AdaptedModule) else layer
        assert isinstance(routed, RoutedLayer)
        takes = routed._projection()[0].shape[1]
        if width is not None and takes != width:
            others[name] = takes
    if others:
        raise ConditionShapeError(
            f"the condition, {tap.description}, has {width} features, and {len(others)} of {len(layers)} layers take "
            f"another width: {_few(f'{name} ({takes})' for name, takes in others.items())}; "
            f"condition_features={width} gives every layer a projection of its own for it"
        )


# ------------------------------------------------------------------------------------------------ files
def save_adapter(model: nn.Module, path: str | Path) -> None:
    """Write the attached adapter of ``model`` to the directory ``path``.

    ``routed_config.json`` is the config; ``routed_adapter.safetensors`` holds the adapter's parameters under
    ``<module path>.lora_A`` and so on, and the parameters and buffers of ``modules_to_save`` under their own names.
    Of a model that is sharded (FSDP2) every rank must call this: the shards are put together, and rank 0 writes.

    Raises:
        AdapterFileError: something else is trainable too, and would be lost; or values are offloaded.
        RoutedPeftError: the model is not attached.
    """
    from safetensors.torch import save_file

    from . import __version__

    record = _record(model)
    _reshard(model)
    tensors = _file_tensors(model, record)
    kept = {id(tensor) for tensor in tensors.values()}
    lost = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in kept]
    if lost:
        raise AdapterFileError(
            f"trainable parameters outside the adapter would be lost: {', '.join(lost)}; "
            "list them in modules_to_save or freeze them"
        )
    if nowhere := [key for key, tensor in tensors.items() if tensor.is_meta]:
        raise AdapterFileError(
            f"{_few(nowhere)} of the model have no values at hand (offloaded, or on the meta device); remove "
            "accelerate's hooks first"
        )
    # Copies, because safetensors refuses tensors that share memory (tied weights).
    copies = {key: whole(tensor.detach()).to("cpu", copy=True).contiguous() for key, tensor in tensors.items()}
    sharded = any(is_sharded(tensor) for tensor in tensors.values())
    try:
        if not sharded or distributed.get_rank() == 0:
            about = {"routed_peft_version": __version__, "base_model_type": _model_type(model)}
            text = json.dumps({**record.config.to_dict(), **about}, indent=2)
            path = Path(path)
            path.mkdir(parents=True, exist_ok=True)
            save_file(copies, path / TENSOR_FILE, metadata={"format": "pt"})
            (path / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")
    finally:
        if sharded:
            distributed.barrier()  # the files are there for every rank that returns


def load_adapter(model: nn.Module, path: str | Path) -> AttachReport:
    """Load what :func:`save_adapter` wrote, attaching it first if ``model`` has no adapter yet.

    Values are copied into the existing parameters, whatever their device, dtype and sharding (FSDP2: on every rank).
    After an error the model is as it was.

    Returns:
        The report of :func:`attach`.

    Raises:
        AdapterFileError: no such files, another config than the attached one, or tensors that do not fit or are
            offloaded.
    """
    path = Path(path)
    config, base, tensors = _read(path)
    fresh = "_routed_peft" not in model.__dict__
    if fresh:
        attach(model, config)
    _reshard(model)
    record = _record(model)
    try:
        ours, theirs = record.config.to_dict(), config.to_dict()
        # Of patterns the first that matches counts, so that their order is part of them.
        differing = [key for key in {**ours, **theirs} if _ordered(ours.get(key)) != _ordered(theirs.get(key))]
        if differing:
            sides = "; ".join(f"{key}: file {theirs.get(key)!r}, model {ours.get(key)!r}" for key in differing)
            raise AdapterFileError(f"{path} has another config than the attached one: {sides}")
        own = _file_tensors(model, record)
        origin = f"{path} (of a {base!r} model) does not fit this {_model_type(model)!r} model"
        missing, unexpected = own.keys() - tensors.keys(), tensors.keys() - own.keys()
        if missing or unexpected:
            raise AdapterFileError(
                f"{origin}: the file lacks {_few(missing)}, which the model has; "
                f"the file has {_few(unexpected)}, which the model lacks"
            )
        differing = [key for key in own if own[key].shape != tensors[key].shape]
        if differing:
            shapes = [f"{key}: file {tuple(tensors[key].shape)}, model {tuple(own[key].shape)}" for key in differing]
            raise AdapterFileError(f"{origin}: shapes differ, {_few(shapes)}")
        if nowhere := [key for key, tensor in own.items() if tensor.is_meta]:
            raise AdapterFileError(
                f"{path}: {_few(nowhere)} of the model have no memory that could take the file's values (offloaded, or "
                "on the meta device); load the adapter first"
            )
    except AdapterFileError:
        if fresh:
            detach(model)
        raise
    with torch.no_grad():
        for key, tensor in own.items():
            tensor.copy_(_sharded_like(tensor, tensors[key]) if is_sharded(tensor) else tensors[key])
    return record.report


def _ordered(value: Any) -> Any:
    return list(value.items()) if isinstance(value, dict) else value


def _read(path: Path) -> tuple[RoutedConfig, Any, dict[str, Tensor]]:
    """The config, the base model's type and the tensors in the directory ``path``."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    for file in (CONFIG_FILE, TENSOR_FILE):
        if not (path / file).is_file():
            raise AdapterFileError(f"{path} holds no {file}")
    try:
        values = json.loads((path / CONFIG_FILE).read_text(encoding="utf-8"))
        tensors = load_file(path / TENSOR_FILE)
    except (ValueError, SafetensorError) as error:
        raise AdapterFileError(f"{path} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise AdapterFileError(f"{path / CONFIG_FILE} must hold a JSON object, got {type(values).__name__}")
    values.pop("routed_peft_version", None)
    base = values.pop("base_model_type", None)
    return RoutedConfig.from_dict(values), base, tensors


def _file_tensors(model: nn.Module, record: _Attached) -> dict[str, Tensor]:
    """The live tensors of the model that the file holds, by their key in it."""
    tensors: dict[str, Tensor] = {}
    for name in record.report.names:
        layer = model.get_submodule(name)
        routed = layer.adapter if isinstance(layer, AdaptedModule) else layer
        tensors.update({f"{name}.{key}": p for key, p in routed.named_parameters(recurse=False)})
    for name in record.saved:
        for key, tensor in model.get_submodule(name).state_dict(keep_vars=True).items():
            if not isinstance(tensor, Tensor):
                raise AdapterFileError(f"'{name}.{key}' in modules_to_save is a {type(tensor).__name__}, not a tensor")
            tensors[f"{name}.{key}"] = tensor
    return tensors


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor, as FSDP2 makes them; without importing those, which takes half a second."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """The tensor, put together if it is sharded; every rank must ask for it."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def _reshard(model: nn.Module) -> None:
    """Let FSDP2 drop the parameters that it has put together: what is written to those does not reach the shards."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    for module in model.modules() if fsdp is not None else ():
        if isinstance(module, fsdp.FSDPModule):  # type: ignore[union-attr]
            module.reshard()


def _sharded_like(tensor: Any, value: Tensor) -> Tensor:
    """This rank's part of ``value``, which every rank has."""
    from torch.distributed.tensor import distribute_tensor

    value = value.to(tensor.device, tensor.dtype)
    return distribute_tensor(value, tensor.device_mesh, tensor.placements, src_data_rank=None)


def _model_type(model: nn.Module) -> str:
    return str(getattr(getattr(model, "config", None), "model_type", type(model).__name__))


def _few(names: Any) -> str:
    names = sorted(names)
    return f"{len(names)}: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}" if names else "nothing"
