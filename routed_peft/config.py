"""What ``attach`` is told: which layers of a model to adapt, and how. Saved beside the adapter's tensors."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from numbers import Integral, Real
from typing import Any, ClassVar

from .errors import AdapterFileError, UnsupportedError
from .modules import MISSING, together
from .routes import ACTIVATIONS, ROUTES, SCALES, number, one_of, positive, probability, resolve_pool

FORMAT_VERSION = 1
ALL_LINEAR = "all-linear"


@dataclass(kw_only=True)
class RoutedConfig:
    """What both configs share. Use :class:`RoutedLoRAConfig` or :class:`RoutedAdapterConfig`.

    Attributes:
        target_modules: names of the layers to adapt. A list holds whole names or their ends ("q_proj" is every module
            whose path ends in ``.q_proj``); a string is a regular expression for the whole path; "all-linear" is every
            linear layer but those of vision towers, projectors and output heads.
        exclude_modules: names to leave alone, a list or a regular expression.
        r: rank (LoRA) or bottleneck width (Adapter).
        routing: a route's name, see :class:`RoutedLoRA`.
        condition_features: width d_c of the condition; None shares the input's projection.
        condition_pool: "auto", "mean", "first" or "none".
        condition_scale: "tokens" or "none".
        missing: without a condition "error", "base" or "lora", see :class:`RoutedLoRA`, also for batches in which only
            some samples have one.
        rank_pattern: regular expression -> ``r`` for the modules whose path, or an end of it, matches. The first that
            matches counts.
        modules_to_save: names, or ends of names, of modules to train as they are and to save with the adapter.
        init: "kaiming" or "gaussian".
        tap: where the model's own call shows the condition: None (it is given with each call), "auto" (by the model's
            type) or the path of the module whose output it is.
        format_version: of the saved form.
    """

    kind: ClassVar[str] = ""

    target_modules: Sequence[str] | str
    exclude_modules: Sequence[str] | str | None = None
    r: int = 8
    routing: str = "gram"
    condition_features: int | None = None
    condition_pool: str = "auto"
    condition_scale: str = "tokens"
    missing: str = "error"
    rank_pattern: dict[str, int] = field(default_factory=dict)
    modules_to_save: Sequence[str] = ()
    init: str = "kaiming"
    tap: str | None = None
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        self.target_modules = _names("target_modules", self.target_modules)
        if not self.target_modules:
            raise ValueError("target_modules must name at least one module")
        if self.exclude_modules is not None:
            self.exclude_modules = _names("exclude_modules", self.exclude_modules)
            if self.exclude_modules == ALL_LINEAR:
                raise ValueError("exclude_modules must be a list of names or a regular expression, got 'all-linear'")
        if isinstance(self.modules_to_save, str):
            raise ValueError(f"modules_to_save must be a list of names, got {self.modules_to_save!r}")
        self.modules_to_save = (
            [] if self.modules_to_save is None else list(_names("modules_to_save", self.modules_to_save))
        )
        positive("r", self.r)
        one_of("routing", self.routing, ROUTES)
        if self.condition_features is not None:
            positive("condition_features", self.condition_features)
        resolve_pool(self.routing, self.condition_pool)
        one_of("condition_scale", self.condition_scale, SCALES)
        one_of("missing", self.missing, MISSING)
        if self.init in ("pissa", "olora", "orthogonal", "eva"):
            raise UnsupportedError(
                f"init={self.init!r} takes the first update out of the base weight, which is right only if the update "
                "is s·B·A·x; a routed update depends on the condition as well"
            )
        one_of("init", self.init, ("kaiming", "gaussian"))
        for pattern, r in _patterns("rank_pattern", self.rank_pattern).items():
            positive(f"rank_pattern[{pattern!r}]", r)
        if self.tap is not None and not (isinstance(self.tap, str) and self.tap):
            raise ValueError(f"tap must be None, 'auto' or the path of a module, got {self.tap!r}")
        if self.format_version != FORMAT_VERSION:
            raise AdapterFileError(f"format_version is {self.format_version!r}, this version reads {FORMAT_VERSION}")

    def to_dict(self) -> dict[str, Any]:
        """The config as plain values that JSON can hold, with its ``kind``."""
        return {"kind": self.kind, **_plain(asdict(self))}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Any:
        """The config that :meth:`to_dict` wrote: of this class, or on the base class of the class ``kind`` names.

        Raises:
            AdapterFileError: an unknown or missing kind, key or format version; the text shows both sides.
            ValueError: a value out of range.
        """
        kinds = {config.kind: config for config in (RoutedLoRAConfig, RoutedAdapterConfig) if issubclass(config, cls)}
        values = dict(values)
        kind = values.pop("kind", None)
        if kind not in kinds:
            raise AdapterFileError(f"the config is of kind {kind!r}, expected {' or '.join(map(repr, kinds))}")
        if values.get("format_version") != FORMAT_VERSION:
            raise AdapterFileError(
                f"the config has format_version {values.get('format_version')!r}, this version reads {FORMAT_VERSION}"
            )
        known = [entry.name for entry in fields(kinds[kind])]
        unknown = [key for key in values if key not in known]
        if unknown:
            raise AdapterFileError(f"the config has unknown keys {unknown}; {kinds[kind].__name__} knows {known}")
        if "target_modules" not in values:
            raise AdapterFileError(f"the config lacks target_modules; it has {list(values)}")
        return kinds[kind](**values)

    def rank_of(self, name: str) -> int:
        """The rank of the module at path ``name``."""
        return next((r for pattern, r in self.rank_pattern.items() if ends_in(pattern, name)), self.r)


@dataclass(kw_only=True)
class RoutedLoRAConfig(RoutedConfig):
    """Routed LoRA on a model's linear layers.

    Attributes:
        lora_alpha: as :class:`RoutedLoRA`, like the next six.
        condition_source: "external" or "in_sequence".
        lora_dropout: dropout of the input.
        condition_dropout: dropout of the condition; None takes ``lora_dropout``.
        use_rslora: scale by alpha / sqrt(r).
        out_slices: (start, stop) pairs of a fused projection's outputs.
        route_across_slices: route the slices' bottlenecks as one.
        alpha_pattern: regular expression -> ``lora_alpha``, as ``rank_pattern``.

    The others as :class:`RoutedConfig`: target_modules, exclude_modules, r, routing, condition_features,
    condition_pool, condition_scale, missing, rank_pattern, modules_to_save, init, tap, format_version.
    """

    kind: ClassVar[str] = "lora"

    lora_alpha: float = 16
    condition_source: str = "external"
    lora_dropout: float = 0.0
    condition_dropout: float | None = None
    use_rslora: bool = False
    out_slices: Sequence[tuple[int, int]] | None = None
    route_across_slices: bool = False
    alpha_pattern: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("condition_source", self.condition_source, ("external", "in_sequence"))
        together(
            self.condition_source, self.condition_features, self.condition_dropout, self.out_slices,
            self.route_across_slices,
        )  # fmt: skip
        number("lora_alpha", self.lora_alpha)
        probability("lora_dropout", self.lora_dropout)
        if self.condition_dropout is not None:
            probability("condition_dropout", self.condition_dropout)
        if self.out_slices is not None:
            self.out_slices = [(int(start), int(stop)) for start, stop in self.out_slices]  # JSON has lists for pairs
        _patterns("alpha_pattern", self.alpha_pattern)

    def layer_options(self, name: str) -> dict[str, Any]:
        """The keywords of :class:`RoutedLoRA` for the module at path ``name``."""
        alpha = next((a for pattern, a in self.alpha_pattern.items() if ends_in(pattern, name)), self.lora_alpha)
        same = (
            "condition_source",
            "lora_dropout",
            "condition_dropout",
            "use_rslora",
            "out_slices",
            "route_across_slices",
        )
        options = {key: getattr(self, key) for key in (*_SHARED, *same)}
        return {**options, "r": self.rank_of(name), "lora_alpha": alpha}


@dataclass(kw_only=True)
class RoutedAdapterConfig(RoutedConfig):
    """Routed bottleneck Adapters around a model's modules (linear layers, attention or feed-forward blocks).

    Attributes:
        activation: as :class:`RoutedAdapter`, like ``bias`` and ``dropout``.
        bias: biases on every projection.
        dropout: dropout of the input and of the condition.
        placement: "sequential", ``adapter(module(x))`` with the residual; "parallel", ``module(x) + adapter(x)``
            without it, for modules as wide at the input as at the output.

    The others as :class:`RoutedConfig`: target_modules, exclude_modules, r, routing, condition_features,
    condition_pool, condition_scale, missing, rank_pattern, modules_to_save, init, tap, format_version.
    """

    kind: ClassVar[str] = "adapter"

    activation: str = "gelu"
    bias: bool = True
    dropout: float = 0.0
    placement: str = "sequential"

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("activation", self.activation, ACTIVATIONS)
        probability("dropout", self.dropout)
        one_of("placement", self.placement, ("sequential", "parallel"))

    def layer_options(self, name: str) -> dict[str, Any]:
        """The keywords of :class:`RoutedAdapter` for the module at path ``name``."""
        options = {key: getattr(self, key) for key in (*_SHARED, "activation", "bias", "dropout")}
        return {**options, "r": self.rank_of(name), "residual": self.placement == "sequential"}


_SHARED = ("routing", "condition_features", "condition_pool", "condition_scale", "missing")


def ends_in(pattern: str, name: str) -> bool:
    """Whether the path ``name``, or an end of it that starts after a dot, matches the regex ``pattern``."""
    return re.fullmatch(rf"(?:.*\.)?(?:{pattern})", name) is not None


def matches(names: Sequence[str] | str, name: str) -> bool:
    """Whether ``target_modules``-like ``names`` (not "all-linear") select the module at path ``name``."""
    if isinstance(names, str):
        return re.fullmatch(names, name) is not None
    return any(name == one or name.endswith("." + one) for one in names)


def _plain(value: Any) -> Any:
    """``value`` with every number in it as Python's own (numpy's are taken, too)."""
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_plain(entry) for entry in value)
    if isinstance(value, bool) or not isinstance(value, Real):
        return value
    return int(value) if isinstance(value, Integral) else float(value)


def _names(argument: str, names: Any) -> Sequence[str] | str:
    if isinstance(names, str):
        _check_regex(argument, names)
        return names
    if not isinstance(names, Sequence) or not all(isinstance(name, str) and name for name in names):
        raise ValueError(f"{argument} must be a list of names or a string, got {names!r}")
    return list(names)


def _patterns(argument: str, patterns: Any) -> Mapping[str, Any]:
    if not isinstance(patterns, Mapping):
        raise ValueError(f"{argument} must be a dict from regular expressions to numbers, got {patterns!r}")
    for pattern, value in patterns.items():
        _check_regex(argument, pattern)
        number(f"{argument}[{pattern!r}]", value)
    return patterns


def _check_regex(argument: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{argument}: {pattern!r} is not a regular expression ({error})") from None
