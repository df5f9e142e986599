"""Which modules of a model a config selects, and which of them cannot or should not be adapted."""

from __future__ import annotations

import difflib
from typing import NoReturn

from torch import nn

from .base_layers import is_conv1d, linear_features
from .config import ALL_LINEAR, RoutedAdapterConfig, RoutedConfig, RoutedLoRAConfig, ends_in, matches
from .errors import RoutedPeftError, UnsupportedError
from .routes import ROUTES

# Parts of paths that "all-linear" leaves alone.
_HEADS = {
    "lm_head", "embed_out", "proj_out", "classifier", "pre_classifier", "classification_head", "score", "qa_outputs",
    "cls", "vocab_transform", "vocab_projector",
}  # fmt: skip
_PROJECTORS = {
    "multi_modal_projector", "mm_projector", "language_projection", "visual_projection", "text_projection", "connector",
    "merger", "deepstack_merger_list", "qformer",
}  # fmt: skip
_TOWERS = {"vision_tower", "vision_model", "vision_encoder", "visual", "image_encoder", "audio_tower", "audio_encoder"}
_TOWER, _PROJECTOR, _HEAD = "part of a vision or audio tower", "part of a projector", "an output head"
_NOT_LINEAR = "not a linear layer"


def select(
    model: nn.Module, config: RoutedConfig, saved: list[str], hits: dict[str, nn.Module] | None = None
) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """The modules to adapt by path, and those that are left alone though ``target_modules`` selects them.

    Args:
        model: the model.
        config: what to adapt.
        saved: paths of ``modules_to_save``.
        hits: what ``target_modules`` selects, if somebody else has found that out.
    """
    targets = config.target_modules
    lora = isinstance(config, RoutedLoRAConfig)
    every = {name: module for name, module in model.named_modules(remove_duplicate=False) if name}
    if hits is None:
        hits = {n: m for n, m in every.items() if (is_linear(m) if targets == ALL_LINEAR else matches(targets, n))}
    roles = _roles(model, hits) if targets == ALL_LINEAR else {}
    causal = not ROUTES[config.routing].causal and _is_causal(model)
    chosen: dict[str, nn.Module] = {}
    skipped: dict[str, str] = {}
    for name, module in hits.items():
        if config.exclude_modules and matches(config.exclude_modules, name):
            skipped[name] = "in exclude_modules"
        elif name in roles:
            skipped[name] = roles[name]
        elif reason := _refusal(model, name, module, config, causal, saved):
            if not isinstance(targets, str):
                raise UnsupportedError(f"'{name}' cannot be adapted: {reason}; name it in exclude_modules")
            skipped[name] = reason
        elif lora and not is_linear(module):
            skipped[name] = _NOT_LINEAR
        else:
            chosen[name] = module
    for entry in [targets] if isinstance(targets, str) else targets:
        one = entry if isinstance(targets, str) else [entry]
        got = [n for n in hits if (targets == ALL_LINEAR or matches(one, n)) and skipped.get(n) != _NOT_LINEAR]
        if not got:
            candidates = [name for name, module in every.items() if is_linear(module) or not lora]
            _no_match(model, f"target_modules={one!r}", "Linear/Conv1D module" if lora else "module", entry, candidates)
    if not chosen:
        first, reason = next(iter(skipped.items()))
        raise RoutedPeftError(
            f"target_modules={targets!r} selects no module of {type(model).__name__} that can be adapted; "
            f"{len(skipped)} were left alone, such as '{first}': {reason}"
        )
    for inner in chosen:
        outer = next((name for name in chosen if inner.startswith(name + ".")), None)
        if outer is not None:
            raise RoutedPeftError(f"target_modules selects '{inner}' and also '{outer}', which contains it")
    for argument in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(config, argument, {}):
            if not any(ends_in(pattern, name) for name in chosen):
                raise RoutedPeftError(f"{argument}: {pattern!r} matches none of the {len(chosen)} adapted modules")
    return chosen, skipped


def _refusal(
    model: nn.Module, name: str, module: nn.Module, config: RoutedConfig, causal: bool, saved: list[str]
) -> str | None:
    """Why ``module`` cannot be adapted, or None."""
    parts = name.split(".")
    for ancestor in (model.get_submodule(".".join(parts[:depth])) for depth in range(len(parts))):
        if isinstance(ancestor, nn.MultiheadAttention):
            return "nn.MultiheadAttention reads the weights of its children and never calls them"
        if isinstance(ancestor, nn.TransformerEncoderLayer):
            return "nn.TransformerEncoderLayer reads the weights of its children in inference and does not call them"
    if "experts" in parts or "expert" in type(module).__name__.lower():
        return "an expert is given tokens gathered from the batch, and which sample each belongs to is lost"
    if any(one == name or one.startswith(name + ".") or name.startswith(one + ".") for one in saved):
        return "it overlaps modules_to_save"
    if causal and _is_causal_part(model, parts):
        return f"routing {config.routing!r} lets every token see the whole input, which breaks a causal model"
    if isinstance(config, RoutedAdapterConfig):
        if type(module).forward is nn.Module.forward:
            return f"a {type(module).__name__} has no forward"
        if output_width(model, name, module) is None:
            return "the width of its output is unknown: not a linear layer, and no hidden_size in the model's config"
        if config.placement == "parallel" and is_linear(module) and len(set(linear_features(module))) == 2:
            inputs, outputs = linear_features(module)
            return f"placement='parallel' needs equal widths, it has {inputs} inputs and {outputs} outputs"
    return None


def _roles(model: nn.Module, hits: dict[str, nn.Module]) -> dict[str, str]:
    """The hits that "all-linear" leaves alone, with the reason."""
    find = getattr(model, "get_output_embeddings", None)
    try:
        head = find() if find is not None else None
    except (AttributeError, NotImplementedError):
        head = None
    roles = {}
    for name, module in hits.items():
        parts = set(name.split("."))
        if module is head or parts & _HEADS:
            roles[name] = _HEAD
        elif parts & _PROJECTORS:
            roles[name] = _PROJECTOR
        elif parts & _TOWERS:
            roles[name] = _TOWER
    if len(roles) == len(hits):  # a vision model on its own is all tower
        return {name: role for name, role in roles.items() if role != _TOWER}
    return roles


def is_linear(module: nn.Module) -> bool:
    """Whether it is an nn.Linear, Conv1D, or a (quantised) layer that has their two sizes."""
    sizes = (getattr(module, "in_features", None), getattr(module, "out_features", None))
    return is_conv1d(module) or all(isinstance(size, int) for size in sizes)


def output_width(model: nn.Module, name: str, module: nn.Module) -> int | None:
    """The width of a module's output: a linear layer's own, else the hidden size of the config it belongs to."""
    if is_linear(module):
        return linear_features(module)[1]
    config = getattr(model, "config", None)
    if set(name.split(".")) & _TOWERS and hasattr(config, "vision_config"):
        config = config.vision_config  # type: ignore[union-attr]
    elif hasattr(config, "get_text_config"):
        config = config.get_text_config()  # type: ignore[union-attr]
    width = getattr(config, "hidden_size", None)
    return width if isinstance(width, int) else None


def _is_causal(model: nn.Module) -> bool:
    """Whether some part of ``model`` reads from left to right: its config, class or attention layers say so."""
    config = getattr(model, "config", None)
    classes = [kind.__name__ for kind in type(model).__mro__]
    return (
        bool(getattr(config, "is_decoder", False) or getattr(config, "is_encoder_decoder", False))
        or any(word in kind for kind in classes for word in ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration"))
        or any(getattr(module, "is_causal", False) is True for module in model.modules())
    )


def _is_causal_part(model: nn.Module, parts: list[str]) -> bool:
    """In a causal model, whether the module at this path is on the causal side."""
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return "decoder" in parts
    return not set(parts) & (_TOWERS | _PROJECTORS)


def modules_to_save(model: nn.Module, config: RoutedConfig) -> list[str]:
    """The paths that ``config.modules_to_save`` names; a name without a module is an error."""
    names = [name for name, _ in model.named_modules() if name]
    for entry in config.modules_to_save:
        if not any(matches([entry], name) for name in names):
            _no_match(model, f"modules_to_save={[entry]!r}", "module", entry, names)
    return [name for name in names if matches(config.modules_to_save, name)]


def _no_match(model: nn.Module, argument: str, what: str, wanted: str, names: list[str]) -> NoReturn:
    """Raise, with the three names that resemble ``wanted`` most (whole paths if it looks like one)."""
    known = list(dict.fromkeys(names if "." in wanted else (name.rpartition(".")[2] for name in names)))
    near = difflib.get_close_matches(wanted, known, n=3, cutoff=0.0)
    raise RoutedPeftError(
        f"{argument} matched no {what} of {type(model).__name__}; nearest names: {', '.join(map(repr, near)) or 'none'}"
    )
