"""Taps: hooks that find a model's condition inside its own call, and deliver it to the routed layers.

A tap fills the slot for as long as the part that it feeds runs, and nothing stays in the slot afterwards. The steps of
a generation bring no image along; for them the key/value cache remembers what its prompt was given
(``delivery.Memory``). So a condition never outlives the tokens it belongs to: with another cache, an emptied one or
none there is no condition, and the layers raise. What the user gives by ``condition()`` or by keyword comes before a
tap.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .delivery import Delivered, Slot, States, bind_checkpoints, cache_in, cache_of, is_empty, memory_of
from .errors import ConditionShapeError, RoutedPeftError, UnsupportedError
from .joint import JointLayers
from .state import ConditionState

AUTO = "auto"
# By config.model_type: which tap, and the parts of the path that end in the module it hooks. Other models are known by
# how they are built (`_entry_of`, `_decoder_of`).
_PRESETS = {
    "blip-2": ("projection", "language_projection"),
    "vision-text-dual-encoder": ("output", "vision_model"),
    "clip": ("output", "vision_model"),
}
_INPUTS = ("inputs_embeds", "input_ids", "decoder_inputs_embeds", "decoder_input_ids")  # one row for each sample
_LANGUAGE_MODELS = ("language_model", "text_model")
_MEDIA = ("image", "video", "audio")
_SCATTERS = ("masked_scatter(", "def inputs_merger(")  # the latter in SmolVLM of transformers 5.20
_OF_IMAGES = r"(?i)visi|visual|image|img|vit\b|multi_?modal|mm_|project|connector|perceiver|qformer"  # a path's words
# Arguments of models that bring images or audio, beside pixel_values and its variants.
_FEATURES = (
    "image_embeds", "image_patches", "mm_encoder_outputs", "input_features", "input_values", "audio_input_ids",
)  # fmt: skip


def find_tap(model: nn.Module, tap: str | None, in_sequence: bool) -> Tap | None:
    """The tap that ``tap`` names for ``model``, not yet installed; None for None.

    Args:
        model: the model to be attached.
        tap: "auto" knows the model by its type or its build; anything else is the path of the module whose output is
            the condition.
        in_sequence: the layers take their condition from their own input, so that only a mask can be tapped.

    Raises:
        UnsupportedError: "auto" does not know the model, or the tap cannot serve in-sequence layers.
        RoutedPeftError: there is no such module.
    """
    if tap is None:
        return None
    kind, path = "output", tap
    if tap == AUTO:
        model_type = getattr(getattr(model, "config", None), "model_type", None)
        if model_type in _PRESETS:
            kind, end = _PRESETS[model_type]
            found = [f"{prefix}{end}" for prefix in ("", "model.") if _has(model, f"{prefix}{end}")]
            if not found:
                raise RoutedPeftError(f"tap='auto': {type(model).__name__} has no module '{end}' or 'model.{end}'")
            path = found[0]
        elif (entry := _entry_of(model)) is not None:
            kind, path = "entry", entry
        elif (decoder := _decoder_of(model)) is not None:
            kind, path = "decoder", decoder
        else:
            raise UnsupportedError(
                f"tap='auto' knows no tap for model type {model_type!r} (it knows {', '.join(_PRESETS)}, "
                "encoder-decoders, and models with transformers' own generate that put images or audio at their tokens "
                "among the embeddings of a decoder-only language model); give the path of the module whose output is "
                "the condition, or pass routed_condition with each call"
            )
        if kind == "projection" and not model.config.use_decoder_only_language_model:  # type: ignore[union-attr]
            raise UnsupportedError(
                "tap='auto' serves BLIP-2 with a decoder-only language model; pass routed_condition with each call"
            )
    elif not _has(model, path):
        raise RoutedPeftError(f"tap={tap!r}: {type(model).__name__} has no module of that path")
    else:
        kind, path = _kind_of(model, path)
    if in_sequence and kind != "entry":
        raise UnsupportedError(
            f"condition_source='in_sequence' needs the positions of the condition in the layers' input, which the tap "
            f"at '{path}' does not know"
        )
    kinds = {"entry": EntryTap, "projection": ProjectionTap, "decoder": DecoderTap, "output": OutputTap}
    return kinds[kind](model, path, in_sequence)


def _entry_of(model: nn.Module) -> str | None:
    """The language model of a vision- or audio-language model that is built as most of transformers' are: the module
    around it takes ``input_ids`` and images or audio, and scatters their features to their tokens among the embeddings.
    None where the model is not built so (one may add features in deeper layers, and have none at the entry), or has a
    ``generate`` of its own, which need not call that module."""
    config: Any = getattr(model, "config", None)
    if not _tokens_of(config, _MEDIA) or getattr(config, "is_encoder_decoder", False) or _generates_itself(model):
        return None
    for path in (f"{prefix}{end}" for prefix in ("model.", "") for end in _LANGUAGE_MODELS):
        if _has(model, path):
            around, inner = model.get_submodule(path.rpartition(".")[0]), model.get_submodule(path)
            names = inspect.signature(around.forward).parameters
            takes = "input_ids" in names and any(map(_is_medium, names))
            apart = getattr(getattr(inner, "config", None), "is_encoder_decoder", False)
            if takes and not apart and _scatters(around):
                return path
    return None


def _decoder_of(model: nn.Module) -> str | None:
    """The decoder of an encoder-decoder, which is called with the encoder's states; None where there is none."""
    get_decoder: Any = getattr(model, "get_decoder", None)
    if get_decoder is None or not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return None
    decoder = get_decoder()
    while "encoder_hidden_states" not in inspect.signature(decoder.forward).parameters:  # a model of both, perhaps
        inner = getattr(decoder, "get_decoder", None)
        around, decoder = decoder, None if inner is None else inner()
        if decoder is None or decoder is around:
            return None
    if decoder is model:
        return None
    paths = [name for name, module in model.named_modules() if module is decoder]
    return paths[0] if paths else None


def _scatters(module: nn.Module) -> bool:
    """Whether its code puts features among embeddings; no code to be read is none that does."""
    for part in type(module).__mro__:
        with contextlib.suppress(OSError, TypeError):
            source = inspect.getsource(part)
            if any(word in source for word in _SCATTERS):
                return True
    return False


def _tokens_of(config: Any, media: tuple[str, ...]) -> dict[str, int]:
    """The token that stands for a part of each of ``media`` in a model's input, where it has one."""
    names = [(kind, f"{kind}_token_{word}") for kind in media for word in ("index", "id")]
    return {kind: token for kind, name in names if isinstance(token := getattr(config, name, None), int)}


def _generates_itself(model: nn.Module) -> bool:
    """Whether generate, or its loop, is the model's own; a user's may well call transformers'."""
    own = (getattr(getattr(type(model), name, None), "__module__", "") for name in ("generate", "_sample"))
    return any(module.startswith(("transformers.models.", "transformers_modules.")) for module in own)


def _kind_of(model: nn.Module, path: str) -> tuple[str, str]:
    """Which tap serves the module at ``path``, and where."""
    config: Any = getattr(model, "config", None)
    preset = _PRESETS.get(getattr(config, "model_type", ""), ("", ""))
    if preset[0] == "projection" and path == preset[1]:
        return preset
    apart = "" if preset[0] != "projection" else f"outside of {type(model).__name__}'s own call"
    get_encoder: Any = getattr(model, "get_encoder", None)
    if get_encoder is not None and getattr(config, "is_encoder_decoder", False):
        encoder, module, decoder = get_encoder(), model.get_submodule(path), _decoder_of(model)
        if module is encoder and decoder is not None:
            return "decoder", decoder  # which is called with the encoder's output, and with its mask
        if any(module is part for part in encoder.modules()):
            apart = "in the encoder"
    if apart:
        raise UnsupportedError(
            f"tap={path!r}: generate runs this module {apart}, and its output ends there; "
            "use tap='auto', or pass routed_condition with each call"
        )
    return "output", path


class Tap:
    """What the taps share. ``install`` hooks the model for one slot, ``remove`` undoes it."""

    def __init__(self, model: nn.Module, path: str, in_sequence: bool) -> None:
        self.model, self.path, self.in_sequence = model, path, in_sequence
        self.handles: list[Any] = []
        self.slot = Slot()
        self.joint: JointLayers | None = None

    @property
    def description(self) -> str:
        """For the report of attach: kind and place."""
        raise NotImplementedError

    @property
    def width(self) -> int | None:
        """Features of the condition, where the model says so before it runs."""
        return None

    def reaches(self, name: str) -> bool:
        """Whether the layer at this path runs while the tapped condition is there."""
        return name.startswith(self.path + ".")

    def install(self, slot: Slot, joint: JointLayers | None = None) -> None:
        """Hook the model; the condition goes to ``slot``, projected for the ``joint`` layers together if given."""
        self.slot, self.joint = slot, joint

    def remove(self) -> None:
        """Undo ``install``."""
        for handle in self.handles:
            handle.remove()

    def _around(self, module: nn.Module, before: Callable[..., None], after: Callable[..., None]) -> None:
        """Hooks around a module's call; ``after`` runs after an exception too."""
        self.handles += [
            module.register_forward_pre_hook(before, with_kwargs=True),
            module.register_forward_hook(after, always_call=True, with_kwargs=True),
        ]

    def _begin(self, module: nn.Module) -> bool:
        """Enter the part of the call that the condition is for; whether the tap is to fill the slot."""
        if torch.is_grad_enabled() and not torch.compiler.is_compiling() and not self.slot.in_call():
            bind_checkpoints(module, [self.slot])  # the model around it, which does that, was not called
        self.slot.enter()
        return not self.slot.held().explicit

    def _fill(self, value: Delivered) -> None:
        self.slot.fill(value if self.joint is None else self.joint.begin(value))

    def _delivered(self, y: Tensor | ConditionState | None, mask: Tensor | None, states: States | None) -> Delivered:
        return self._with_input_mask(Delivered(y, mask, None, None, states))

    def _with_input_mask(self, value: Delivered) -> Delivered:
        """``value`` with the input mask of this call, which belongs to the rows of this call."""
        now = self.slot.value()
        return value._replace(input_mask=None if now is None else now.input_mask)

    def _recall(self, cache: Any) -> None:
        """Deliver what ``cache`` remembers of its prompt; an empty one has forgotten."""
        memory = memory_of(cache, self.slot)
        if memory is None or memory.tapped is None:
            return
        if is_empty(cache):
            memory.forget()
        elif not self.slot.held().explicit:
            self._fill(self._with_input_mask(memory.recall(f"the tap at '{self.path}'")))

    def _remember(self, cache: Any, args: Any, kwargs: Mapping[str, Any]) -> None:
        """Let ``cache`` remember what was tapped in this call."""
        held, memory = self.slot.held(), memory_of(cache, self.slot)
        if memory is not None and held.tapped and held.value is not None and not held.value.recalled:
            memory.remember(held.value, _batch_of(args, kwargs), self._marked(held.value))

    def _marked(self, value: Delivered) -> Tensor | None:
        """Which of the tokens that the cache holds first the condition was made of, [batch, N]; None if of none."""
        return None

    def _refuse_late(self) -> None:
        raise UnsupportedError(
            f"the tap at '{self.path}' was given a condition when the cache already held tokens, which were routed "
            "without it (a prefill in chunks, or a later turn); pass routed_condition with every call"
        )


class LanguageModelTap(Tap):
    """At a language model that generates: what its prompt was given stays with the key/value cache."""

    @property
    def width(self) -> int | None:
        """The language model's own, which images are projected to."""
        config: Any = self.model.config
        return _width_in(config.get_text_config())

    def find(self, kwargs: Mapping[str, Any]) -> tuple[Tensor | None, Tensor | None] | None:
        """The condition and the mask that this call brings, or None."""
        raise NotImplementedError

    def before(self, module: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
        """Deliver the image of this call, else that of the call which filled the cache."""
        fills = self._begin(module)  # first: ``after`` leaves what this enters, whatever is raised here
        found = self.find(kwargs)
        self.slot.arrival = None
        cache = cache_in(kwargs)
        if found is None or not fills:
            self._recall(cache)
            return
        if not is_empty(cache):
            self._refuse_late()
        self._fill(self._delivered(*found, None if torch.is_grad_enabled() else States(owned=True)))
        self._remember(cache, args, kwargs)

    def after(self, module: nn.Module, args: Any, kwargs: Mapping[str, Any], out: Any) -> None:
        """Let a cache that the call made remember its condition, too."""
        self._remember(cache_of(out), args, kwargs)
        self.slot.leave()


class EntryTap(LanguageModelTap):
    """At the entry of the language model, where features of images or of audio stand among the embeddings.

    The condition is the embeddings at their tokens, as all embeddings [B, N, d] and a mask [B, N]: nothing has to
    wait for the device, and samples may have different numbers of images. In-sequence layers get the mask alone.
    """

    def __init__(self, model: nn.Module, path: str, in_sequence: bool) -> None:
        super().__init__(model, path, in_sequence)
        self.tokens = _tokens_of(model.config, _MEDIA)
        self.names = list(inspect.signature(self._parent().forward).parameters)

    @property
    def description(self) -> str:
        """Kind and place."""
        return f"{', '.join(self.tokens)} tokens at the entry of '{self.path}'"

    def install(self, slot: Slot, joint: JointLayers | None = None) -> None:
        """Hook the language model, and the model around it, which knows the tokens."""
        super().install(slot, joint)
        self._around(self._parent(), self.arrive, self.depart)
        self._around(self.model.get_submodule(self.path), self.before, self.after)

    def _parent(self) -> nn.Module:
        return self.model.get_submodule(self.path.rpartition(".")[0])

    def arrive(self, module: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
        """Note where the tokens of this call's images or audio are; nothing if it brings none."""
        self.slot.arrival = None
        call = {**dict(zip(self.names, args, strict=False)), **kwargs}
        if self.slot.held().explicit or not any(_brings(name, value) for name, value in call.items()):
            return
        ids = call.get("input_ids")
        if ids is None:
            raise UnsupportedError(
                f"the tap at '{self.path}' finds the {', '.join(self.tokens)} tokens in input_ids, which this call "
                "does not give; pass routed_condition"
            )
        if _is_packed(call):
            raise UnsupportedError(
                f"the tap at '{self.path}' takes a row of input_ids for one sample, and this call packs several into "
                "one: each would be routed by the images of all; pad them to rows of their own, or call the layers "
                "with cu_seqlens and condition_cu_seqlens"
            )
        self.slot.arrival = functools.reduce(torch.logical_or, [ids == token for token in self.tokens.values()])

    def depart(self, module: nn.Module, args: Any, kwargs: Mapping[str, Any], out: Any) -> None:
        """The call is over."""
        self.slot.arrival = None

    def find(self, kwargs: Mapping[str, Any]) -> tuple[Tensor | None, Tensor | None] | None:
        """All embeddings, with the mask of those tokens."""
        mask = self.slot.arrival
        if mask is None:
            return None
        embeds = kwargs.get("inputs_embeds")
        if embeds is None or embeds.shape[:2] != mask.shape:
            got = "none" if embeds is None else tuple(embeds.shape)
            raise UnsupportedError(
                f"the tap at '{self.path}' finds the condition among the inputs_embeds of a call with input_ids "
                f"{tuple(mask.shape)}, and got {got}; pass routed_condition"
            )
        return (None if self.in_sequence else embeds), mask

    def _marked(self, value: Delivered) -> Tensor | None:
        return value.mask


class ProjectionTap(LanguageModelTap):
    """BLIP-2: the output of the projection [B, M, d], for the language model's call that follows.

    With beams the language model has k rows for each projected one, which the layers take as such.
    """

    entry = "language_model"

    @property
    def description(self) -> str:
        """Kind and place."""
        return f"output of '{self.path}'"

    def reaches(self, name: str) -> bool:
        """The language model's layers alone."""
        return name.startswith(self.entry + ".")

    def install(self, slot: Slot, joint: JointLayers | None = None) -> None:
        """Hook the projection and the language model."""
        super().install(slot, joint)
        language_model = self.model.get_submodule(self.entry)
        self.handles.append(self.model.get_submodule(self.path).register_forward_hook(self.project))
        self._around(language_model, self.before, self.after)

    def project(self, module: nn.Module, args: Any, out: Tensor) -> None:
        """Keep the projection for the language model's next call, if it is made in a call or a generate."""
        if self.slot.in_call() or self.slot.in_generation():
            self.slot.arrival = out

    def find(self, kwargs: Mapping[str, Any]) -> tuple[Tensor | None, Tensor | None] | None:
        """What was projected since the model's call, or its generate, began."""
        return None if self.slot.arrival is None else (self.slot.arrival, None)

    def _marked(self, value: Delivered) -> Tensor | None:
        """The projected tokens stand at the front."""
        y = value.condition
        return torch.ones(1, y.shape[1], dtype=torch.bool) if isinstance(y, Tensor) else None


class DecoderTap(Tap):
    """At the decoder of an encoder-decoder: the encoder's states [B, M, d] and attention mask [B, M]."""

    @property
    def width(self) -> int | None:
        """One for encoder and decoder, where the model has but one."""
        width = getattr(self.model.config, "d_model", None)
        return width if isinstance(width, int) else None

    @property
    def description(self) -> str:
        """Kind and place."""
        return f"encoder states at '{self.path}'"

    def install(self, slot: Slot, joint: JointLayers | None = None) -> None:
        """Hook the decoder."""
        super().install(slot, joint)
        self._around(self.model.get_submodule(self.path), self.before, self.after)

    def before(self, module: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
        """Deliver what the decoder is called with."""
        y, mask = kwargs.get("encoder_hidden_states"), kwargs.get("encoder_attention_mask")
        if not self._begin(module) or y is None:
            return
        if mask is not None and mask.dim() != 2:
            raise ConditionShapeError(
                f"the tap at '{self.path}' needs an encoder attention mask [batch, tokens], got {tuple(mask.shape)}"
            )
        cache = cache_in(kwargs)
        if memory_of(cache, self.slot) is None or torch.is_grad_enabled() or torch.compiler.is_compiling():
            self._fill(self._delivered(y, _as_bool(mask), None))
        else:
            self._fill(self._with_input_mask(self._kept(y, mask, cache, args, kwargs)))

    def _kept(self, y: Tensor, mask: Tensor | None, cache: Any, args: Any, kwargs: Mapping[str, Any]) -> Delivered:
        """The condition for a call with ``cache``, which keeps its states."""
        memory = memory_of(cache, self.slot)
        assert memory is not None
        # Owned: if somebody wrote the states between two steps, the cross-attention would not see it either.
        fresh = is_empty(cache) or memory.tapped is None or _is_written(mask, memory.version, memory.tapped.mask)
        states, met = memory.states_for(y, mask, fresh=fresh, owned=True)
        if not met:  # one mask for all steps: it is part of the key
            version = None if mask is None or mask.is_inference() else mask._version
            memory.remember(self._delivered(y, _as_bool(mask), states), _batch_of(args, kwargs), None, version)
        return memory.recall(f"the tap at '{self.path}'")

    def after(self, module: nn.Module, args: Any, kwargs: Mapping[str, Any], out: Any) -> None:
        """Watch a cache that the decoder made, too."""
        cache, held = cache_of(out), self.slot.held()
        y, mask = kwargs.get("encoder_hidden_states"), kwargs.get("encoder_attention_mask")
        made = cache_in(kwargs) is None and hasattr(cache, "get_seq_length")
        if y is not None and held.tapped and made and not (torch.is_grad_enabled() or torch.compiler.is_compiling()):
            self._kept(y, mask, cache, args, kwargs)
        self.slot.leave()


class OutputTap(Tap):
    """The output of a module, [B, M, d] or [B, d], for what runs after it in the same call of the model.

    Calls with a key/value cache that bring none take that of the call which filled the cache. Where the module makes
    images' features and the model has tokens for images, these show which rows have any: where one has none and another
    has, as many images as rows are not one for each.
    """

    def __init__(self, model: nn.Module, path: str, in_sequence: bool) -> None:
        super().__init__(model, path, in_sequence)
        self.names = list(inspect.signature(model.forward).parameters)
        can_generate: Any = getattr(model, "can_generate", None)
        self.generates = bool(can_generate is not None and can_generate())
        of_images = re.search(_OF_IMAGES, path) is not None
        self.tokens = [*_tokens_of(getattr(model, "config", None), ("image", "video")).values()] if of_images else []

    @property
    def width(self) -> int | None:
        """Of a linear layer, or of a vision model that is known."""
        out = getattr(self.model.get_submodule(self.path), "out_features", None)
        config: Any = getattr(self.model, "config", None)
        if _PRESETS.get(getattr(config, "model_type", "")) == ("output", self.path.rpartition(".")[2]):
            return _width_in(config.vision_config)
        return out if isinstance(out, int) else None

    @property
    def description(self) -> str:
        """Kind and place."""
        return f"output of '{self.path}'"

    def reaches(self, name: str) -> bool:
        """Everything but what makes the condition."""
        return name != self.path and not name.startswith(self.path + ".")

    def install(self, slot: Slot, joint: JointLayers | None = None) -> None:
        """Hook the module, and the model, whose calls have the cache."""
        super().install(slot, joint)
        self.handles.append(self.model.get_submodule(self.path).register_forward_hook(self.tap))
        self._around(self.model, self.before, self.after)

    def before(self, module: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
        """Deliver what came before the call, in a generate, else what the cache remembers."""
        found, self.slot.arrival = self.slot.arrival, None
        call = self._call(args, kwargs)
        ids = call.get("input_ids")
        self.slot.shown = None
        if self.tokens and isinstance(ids, Tensor) and ids.dim() == 2:
            self.slot.shown = torch.stack([ids == token for token in self.tokens]).any(0).any(1)
        self._recall(cache_in(call))
        if found is not None:
            rows, batch = found.shape[0], _batch_of(args, kwargs)
            self._deliver(found, batch // rows if rows and batch % rows == 0 else 1)  # beams: rows in a row for each

    def tap(self, module: nn.Module, args: Any, out: Any) -> None:
        """Deliver the output; outside of a call of the model and of generate there is nobody to deliver it to."""
        in_call = self.slot.in_call()
        if self.slot.held().explicit or not (in_call or self.slot.in_generation()):
            return
        y = getattr(out, "last_hidden_state", out[0] if isinstance(out, tuple) else out)
        if not isinstance(y, Tensor) or y.dim() not in (2, 3):
            shape = tuple(y.shape) if isinstance(y, Tensor) else type(out).__name__
            raise ConditionShapeError(
                f"the output of '{self.path}' must be [batch, tokens, features] or [batch, features] to be a "
                f"condition, got {shape}"
            )
        if in_call:
            self._deliver(y, 1)
        elif self.slot.arrival is not None:
            self._refuse_second()
        else:
            self.slot.arrival = y

    def _deliver(self, y: Tensor, times: int) -> None:
        held = self.slot.held()
        if held.explicit:
            return
        if held.tapped and held.value is not None:
            (self._refuse_late if held.value.recalled else self._refuse_second)()
        # An index names each row, so that k texts for each image raise: they are no beams, and need not lie in order.
        rows = torch.arange(y.shape[0], device=y.device).repeat_interleave(times)
        shown = self.slot.shown
        if shown is not None and shown.shape == rows.shape:
            lost = shown.any() & ~shown
            if not shown.is_cpu or torch.compiler.is_compiling():  # to look would wait: such rows become NaN
                rows = rows.masked_fill(lost.to(rows.device), -1)
            elif bool(lost.any()):
                raise UnsupportedError(
                    f"the module of the tap, '{self.path}', gave {y.shape[0]} outputs for {len(shown)} rows, and row "
                    f"{int(lost.int().argmax())} has no image token: which output belongs to which row is unknown; "
                    "pass routed_condition"
                )
        states = States(owned=True) if self.generates and not torch.is_grad_enabled() else None
        self._fill(self._delivered(y, None, states)._replace(index=rows))

    def _refuse_second(self) -> None:
        raise UnsupportedError(
            f"the module of the tap, '{self.path}', ran twice in one call, and which output is the condition is "
            "unknown; pass routed_condition"
        )

    def after(self, module: nn.Module, args: Any, kwargs: Mapping[str, Any], out: Any) -> None:
        """Let the cache remember, the given one or the one that the call made."""
        self.slot.shown = None
        given = cache_in(self._call(args, kwargs))
        self._remember(cache_of(out) if given is None else given, args, kwargs)

    def _call(self, args: Any, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        return {**dict(zip(self.names, args, strict=False)), **kwargs}


def _has(model: nn.Module, path: str) -> bool:
    try:
        model.get_submodule(path)
    except AttributeError:
        return False
    return True


def _is_medium(name: str) -> bool:
    return name.startswith("pixel_values") or name in _FEATURES


def _brings(name: str, value: Any) -> bool:
    """Whether a model's argument brings images, video or audio; generate passes an empty mapping where none are."""
    if not _is_medium(name):
        return False
    return any(part is not None for part in value.values()) if isinstance(value, Mapping) else value is not None


def _is_packed(call: Mapping[str, Any]) -> bool:
    """Whether a model's call says that samples follow one another in a row, which attention keeps apart: by their
    offsets, or by numbers of samples or positions that start again (looked at on the CPU only: elsewhere that would
    wait for the device)."""
    offsets, samples, positions = (call.get(name) for name in ("cu_seq_lens_q", "seq_idx", "position_ids"))
    if isinstance(offsets, Tensor) and offsets.numel() - 1 > len(call["input_ids"]):
        return True
    if torch.compiler.is_compiling():
        return False
    numbers = samples if isinstance(samples, Tensor) and samples.is_cpu and samples.dim() == 2 else None
    if numbers is not None and bool((numbers != numbers[:, :1]).any()):
        return True
    if not isinstance(positions, Tensor) or not positions.is_cpu:
        return False
    if positions.dim() == 3 and positions.shape[0] == 4:
        positions = positions[0]  # of the text, before the three of Qwen-VL's rotary embedding
    if positions.dim() != 2:
        return False
    # Between two rises: padding stands still.
    step = positions.diff()
    return bool(((step[:, :-2] == 1) & (step[:, 1:-1] < 0) & (step[:, 2:] == 1)).any())


def _width_in(config: Any) -> int | None:
    width = getattr(config, "hidden_size", None)
    return width if isinstance(width, int) else None


def _batch_of(args: Any, kwargs: Mapping[str, Any]) -> int:
    """How many rows a call has."""
    given = (value for name in _INPUTS if (value := kwargs.get(name)) is not None)
    return int(next(given, args[0] if args else torch.empty(0)).shape[0])


def _is_written(mask: Tensor | None, version: int | None, before: Tensor | None) -> bool:
    """Whether ``mask`` was written since it had that version (in inference mode, which counts none: those values)."""
    if mask is None or before is None:
        return False  # another tensor than before, which is noticed anyway
    return not torch.equal(mask != 0, before) if mask.is_inference() else mask._version != version


def _as_bool(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask != 0  # users give floats, too
