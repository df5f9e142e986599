"""RoutedLoRA and RoutedAdapter: the layers a user puts into a model."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from . import functional, ops, reference
from .base_layers import dense, hooked, is_conv1d, linear_features, may_read_weight, parameter_options, patched
from .delivery import Delivered, Slot
from .errors import ConditionShapeError, MissingConditionError, UnsupportedError
from .reference import Options
from .routes import ACTIVATIONS, ROUTES, SCALES, number, one_of, positive, probability, resolve_pool
from .state import ConditionState

MISSING = ("error", "base", "lora")


class RoutedLayer(nn.Module):
    """What both layers share: options, and where the condition of a call comes from."""

    def __init__(
        self, r: int, routing: str, condition_pool: str, condition_scale: str, missing: str, backend: str
    ) -> None:
        super().__init__()
        positive("r", r)
        self.r = r
        self.routing = one_of("routing", routing, ROUTES)
        self.condition_pool = condition_pool
        resolve_pool(routing, condition_pool)
        self.condition_scale = one_of("condition_scale", condition_scale, SCALES)
        self.missing = one_of("missing", missing, MISSING)
        self.backend = one_of("backend", backend, ("auto", *ops.BACKENDS, "reference"))
        self.condition_source = "external"
        self.name = ""  # the path in the model, set by attach; for error texts
        self.slot: Slot | None = None  # where the model's condition is delivered, set by attach or condition()

    @property
    def label(self) -> str:
        """How error texts call this layer."""
        return f"{type(self).__name__} '{self.name}'" if self.name else type(self).__name__

    def _delivered(
        self, x: Tensor, condition: Any, mask: Tensor | None, index: Tensor | None, input_mask: Tensor | None
    ) -> Delivered | None:
        """The condition of this call: the explicit arguments, else what the model's slot holds; None if missing."""
        if self.routing == "none":
            return Delivered(None, None, None, input_mask)
        in_sequence = self.condition_source == "in_sequence"
        if condition is not None or (in_sequence and mask is not None):
            if in_sequence and condition is not None:
                raise ConditionShapeError(
                    f"{self.label}: condition_source='in_sequence' takes its condition from the input at "
                    "condition_mask; pass no condition"
                )
            return Delivered(condition, mask, index, input_mask)
        slot = self.slot.read(self) if self.slot is not None else None
        if slot is not None and slot.states is not None:
            given, slot = slot, self._remembered(x, slot)
            in_sequence = in_sequence and slot.condition is given.condition  # else there is a state of its rows
        if slot is not None:
            slot = self._joined(x, slot)
        if in_sequence and slot is not None and slot.recalled:
            raise UnsupportedError(
                f"{self.label}: the marked rows of its in-sequence condition were in an earlier call with this cache, "
                "and no state of them can be used now: it is kept by a call without gradients and outside of "
                "torch.compile, for one of the same dtype; run the whole sequence without a cache"
            )
        if slot is not None and (slot.mask if in_sequence else slot.condition) is not None:
            if mask is not None or index is not None:
                raise ConditionShapeError(
                    f"{self.label}: condition_mask and condition_index go with a condition argument; the condition of "
                    "this call was delivered with its own"
                )
            if in_sequence:
                return Delivered(None, slot.mask, None, slot.input_mask if input_mask is None else input_mask)
            return slot if input_mask is None else slot._replace(input_mask=input_mask)
        if self.missing == "error":
            what, keyword = ("None, mask", "_mask=mask") if in_sequence else ("y", "=y")
            raise MissingConditionError(
                f"{self.label} ran without a condition. Wrap the call in 'with routed_peft.condition(model, {what}):', "
                f"pass 'routed_condition{keyword}' to the model, or attach a tap; set missing='base' to fall back to "
                "the frozen layer."
            )
        return None

    def _remembered(self, x: Tensor, given: Delivered) -> Delivered:
        """``given`` during a generation: with the state, which the prompt's call encodes and the next ones reuse."""
        assert given.states is not None
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return given
        dtype = functional.compute_dtype(x)
        if self.condition_source == "in_sequence":
            state = None
            if given.mask is None:
                if given.states.ran_twice(self):
                    raise UnsupportedError(
                        f"{self.label}: it ran more than once in the prompt's call, so a later step cannot tell which "
                        "of its in-sequence conditions to use; generate without a cache"
                    )
                state = given.states.find(self, dtype)
            elif x.shape[:-1].numel() == given.mask.numel() and (x.dim() == 2 or len(x) == len(given.mask)):
                rows = x.reshape(*given.mask.shape, x.shape[-1])
                state = given.states.keep_once(self, dtype, self._encode(rows, given.mask))
            return given if state is None else given._replace(condition=state, mask=None)
        y, mask = given.condition, given.mask
        if self.training or not isinstance(y, Tensor):  # in training mode dropout is drawn at each step
            return given
        versions = [None if t is None or t.is_inference() else t._version for t in (y, mask)]
        if not given.states.owned and (y.is_inference() or (mask is not None and mask.is_inference())):
            return given  # somebody may write it, and no version would tell
        key = dtype, versions
        state = given.states.find(self, key)
        if state is None or not state.is_of(*self._projection()[:2]):
            if self.computes_projection():
                return given  # no state can be told to be of it
            try:
                joint = None if given.joint is None else given.joint.state_of(self, dtype)
                if joint is None:
                    joint = self._encode(y.to(dtype), mask)
                # its own memory, and once: a part of the wide tensor would be copied by every call
                held = ConditionState(joint.routing, joint.tensor.contiguous(), joint.versions)
                state = given.states.keep(self, key, held)
            except ConditionShapeError:
                return given  # for the call itself to refuse, which knows its input too
        return Delivered(state, None, given.index, given.input_mask, given.states, given.recalled, given.joint)

    def _joined(self, x: Tensor, given: Delivered) -> Delivered:
        """``given`` with this layer's part of what was made of the condition for all layers, if there is one."""
        joint = given.joint
        if joint is None or not isinstance(given.condition, Tensor) or torch.compiler.is_compiling():
            return given
        state = joint.state_of(self, functional.compute_dtype(x))
        return given if state is None else given._replace(condition=state, mask=None)

    def _touch(self, out: Tensor, *parameters: Tensor | None) -> Tensor:
        """``out`` plus zero times every parameter: a distributed run that waits for their gradients gets them."""
        if not (torch.is_grad_enabled() and any(p is not None and p.requires_grad for p in parameters)):
            return out
        zero = sum((p * 0).sum() for p in parameters if p is not None and p.requires_grad)
        return out + zero.to(out.dtype)  # type: ignore[union-attr]

    def _projection(self) -> tuple[Tensor, Tensor | None, int]:
        """What projects the condition: the matrix, its bias, and how many output slices route on their own."""
        raise NotImplementedError

    def computes_projection(self) -> bool:
        """Whether that matrix is another tensor at every look (torch.nn.utils.parametrize)."""
        return self._projection()[0] is not self._projection()[0]

    def shares_projection(self) -> bool:
        """Whether the condition is projected with the matrix that the input goes through too."""
        raise NotImplementedError

    def condition_p(self) -> float:
        """The dropout probability of the condition, as the layer runs now."""
        raise NotImplementedError

    def encode_condition(self, condition: Tensor, condition_mask: Tensor | None = None) -> ConditionState:
        """Encode a condition y [B, M, d_c] or [B, d_c] (mask [B, M]) once, for many calls of this layer.

        Returns:
            The state; without dropout. It goes stale when the matrix that projects it changes.

        Raises:
            UnsupportedError: the condition is in-sequence, or the matrix that projects it is parametrised, so that
                nothing could tell whether it changed.
        """
        self._refuse_in_sequence()
        if self.computes_projection():
            raise UnsupportedError(
                f"{self.label}: what projects the condition is parametrised (torch.nn.utils.parametrize), so nothing "
                "would tell when a state of it is stale; pass the condition with each call"
            )
        return self._encode(condition, condition_mask)

    def _refuse_in_sequence(self) -> None:
        if self.condition_source == "in_sequence":
            raise UnsupportedError(
                f"{self.label}: an in-sequence condition is part of the input and cannot be encoded apart"
            )

    def _encode(self, condition: Tensor, mask: Tensor | None) -> ConditionState:
        c, b_c, groups = self._projection()
        return functional.encode_condition(
            condition, c, routing=self.routing, mask=mask, pool=self.condition_pool, scale=self.condition_scale,
            b_C=b_c, groups=groups, backend=self.backend, name=self.label,
        )  # fmt: skip


def together(
    condition_source: str,
    condition_features: int | None,
    condition_dropout: float | None,
    out_slices: Sequence[tuple[int, int]] | None,
    route_across_slices: bool,
) -> None:
    """A ValueError where options of a RoutedLoRA exclude one another, so that one of them would do nothing."""
    in_sequence = condition_source == "in_sequence"
    if in_sequence and condition_features is not None:
        raise ValueError("condition_source='in_sequence' shares lora_A, so condition_features must be None")
    if in_sequence and condition_dropout is not None:
        raise ValueError("condition_source='in_sequence' shares lora_dropout, so condition_dropout must be None")
    if route_across_slices and not out_slices:
        raise ValueError("route_across_slices=True needs out_slices")


class LowRankUpdate(RoutedLayer):
    """The routed update of a linear layer that it does not hold: ``s · ρ(x Aᵀ, y Cᵀ) B̂ᵀ``.

    What :class:`RoutedLoRA`, which holds its base layer, and the PEFT tuner's layers, which hold one base layer and
    several updates, have in common: parameters, options and the forward. The arguments are those of RoutedLoRA; of
    ``base_layer`` only the widths, device and dtype are read.
    """

    parameter_names = ("lora_A", "lora_B", "condition_A")  # of A, B and C, in a state dict

    def __init__(
        self,
        base_layer: nn.Module,
        r: int = 8,
        lora_alpha: float = 16,
        *,
        routing: str = "gram",
        condition_features: int | None = None,
        condition_source: str = "external",
        condition_pool: str = "auto",
        condition_scale: str = "tokens",
        lora_dropout: float = 0.0,
        condition_dropout: float | None = None,
        use_rslora: bool = False,
        out_slices: Sequence[tuple[int, int]] | None = None,
        route_across_slices: bool = False,
        missing: str = "error",
        backend: str = "auto",
    ) -> None:
        super().__init__(r, routing, condition_pool, condition_scale, missing, backend)
        self.condition_source = one_of("condition_source", condition_source, ("external", "in_sequence"))
        if condition_features is not None:
            positive("condition_features", condition_features)
        number("lora_alpha", lora_alpha)
        probability("lora_dropout", lora_dropout)
        if condition_dropout is not None:
            probability("condition_dropout", condition_dropout)
        out_slices = None if out_slices is None else list(out_slices)
        if not all(isinstance(pair, Iterable) and len([*pair]) == 2 for pair in out_slices or []):
            raise ValueError(f"out_slices must be pairs (start, stop), got {out_slices!r}")
        together(condition_source, condition_features, condition_dropout, out_slices, route_across_slices)
        self.in_features, self.out_features = linear_features(base_layer)
        self.lora_alpha, self.use_rslora = lora_alpha, use_rslora
        self.scaling = lora_alpha / (math.sqrt(r) if use_rslora else r)
        self.lora_dropout, self.condition_dropout = lora_dropout, condition_dropout
        self.out_slices = [(int(start), int(stop)) for start, stop in out_slices] if out_slices else None
        before = 0
        for start, stop in sorted(self.out_slices or []):
            if not before <= start < stop <= self.out_features:
                raise ValueError(
                    f"out_slices: ({start}, {stop}) is empty, overlaps another slice or does not lie in the "
                    f"{self.out_features} outputs"
                )
            before = stop
        self.route_across_slices = route_across_slices
        count = len(self.out_slices) if self.out_slices else 1
        outputs = sum(stop - start for start, stop in self.out_slices) if self.out_slices else self.out_features
        self.groups = 1 if route_across_slices else count

        like = parameter_options(base_layer)
        own = None if routing == "none" else condition_features
        shapes = (r * count, self.in_features), (outputs, r), None if own is None else (r * count, own)
        for name, shape in zip(self.parameter_names, shapes, strict=True):
            self.register_parameter(name, None if shape is None else nn.Parameter(torch.empty(*shape, **like)))
        self.reset_parameters()
        self._hold(base_layer)

    def _hold(self, base_layer: nn.Module) -> None:
        """An update alone keeps no base layer."""

    def _parameter(self, i: int) -> nn.Parameter | None:
        name, own = self.parameter_names[i], self._parameters  # nn.Module's own way to an attribute is slow
        return own[name] if name in own else getattr(self, name)

    @property
    def A(self) -> nn.Parameter:
        """[R, in]."""
        return self._parameter(0)  # type: ignore[return-value]

    @property
    def B(self) -> nn.Parameter:
        """[adapted outputs, r]."""
        return self._parameter(1)  # type: ignore[return-value]

    @property
    def C(self) -> nn.Parameter | None:
        """[R, d_c], or None where A projects the condition too."""
        return self._parameter(2)

    def reset_parameters(self, init: str = "kaiming") -> None:
        """A and C Kaiming-uniform with a = √5 ("kaiming") or N(0, 1/r) ("gaussian"); B zero."""
        one_of("init", init, ("kaiming", "gaussian"))
        for projection in (self.A, self.C):
            if projection is not None and init == "kaiming":
                nn.init.kaiming_uniform_(projection, a=math.sqrt(5))
            elif projection is not None:
                nn.init.normal_(projection, std=1 / self.r)
        nn.init.zeros_(self.B)

    def add_to(
        self,
        base: nn.Module | Tensor,
        x: Tensor,
        condition: Tensor | ConditionState | None = None,
        condition_mask: Tensor | None = None,
        condition_index: Tensor | None = None,
        *,
        input_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        condition_cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """The output of ``base`` for x plus the update; ``base`` is the layer, or what it gave for x [..., out].

        The other arguments, result and errors as :meth:`RoutedLoRA.forward`.
        """
        given = self._delivered(x, condition, condition_mask, condition_index, input_mask)
        if given is None and self.missing == "base":
            plain = base if isinstance(base, Tensor) else base(x)
            self._tell_of_lost_gradient(x, plain)
            return self._touch(plain, self.A, self.B, self.C)
        y, mask, index, valid, *_ = given if given is not None else Delivered(None, None, None, None)
        a, b, c = self.A, self.B, self.C
        w = bias = plain = None
        if isinstance(base, Tensor):
            plain = base
        elif may_read_weight(base, x):
            w = base._parameters["weight"] if type(base) is nn.Linear else base.weight.t()  # type: ignore[operator]
            bias = base._parameters["bias"]
        else:
            plain = base(x)
        fits = False
        if plain is not None:
            self._tell_of_lost_gradient(x, plain)
            wanted = (*x.shape[:-1], self.out_features)
            fits = type(plain) is Tensor and plain.dtype == functional.compute_dtype(x) and plain.shape == wanted
        # A base layer's output that fits is read once, and the sum written to a tensor of our own: it may be something
        # that layer's backward, a hook or a cache still reads.
        out = functional.apply(
            self.label, x, a, y, b, c, W=w, bias=bias, base=plain if fits else None, out_features=self.out_features,
            routing=self.routing if given is not None else "none", scaling=self.scaling, mask=mask, index=index,
            input_mask=valid, pool=self.condition_pool, scale=self.condition_scale,
            dropout_p=self.lora_dropout if self.training else 0.0, condition_dropout_p=self.condition_p(),
            out_slices=self.out_slices, route_across_slices=self.route_across_slices, cu_seqlens=cu_seqlens,
            condition_cu_seqlens=condition_cu_seqlens, own_state=True, backend=self.backend,
        )  # fmt: skip
        if plain is not None and not fits:
            out = plain + out.to(plain.dtype).reshape(plain.shape)
        return out if given is not None else self._touch(out, c)

    def _tell_of_lost_gradient(self, x: Tensor, plain: Tensor) -> None:
        if torch.compiler.is_compiling() or not torch.is_grad_enabled() or not x.requires_grad or plain.requires_grad:
            return
        warnings.warn(
            f"{self.label}: the base layer gives its input no gradient, as layers that are quantised for inference do; "
            "what comes before it is trained by the update's part alone",
            stacklevel=3,
        )

    def condition_p(self) -> float:
        """The dropout probability of the condition: none in eval mode, the input's if it has none of its own."""
        p = self.lora_dropout if self.condition_dropout is None else self.condition_dropout
        return p if self.training else 0.0

    def _projection(self) -> tuple[Tensor, Tensor | None, int]:
        return (self.A if self.C is None else self.C), None, self.groups

    def shares_projection(self) -> bool:
        """Whether A projects the condition too."""
        return self.C is None

    def bake_into(
        self, base_layer: nn.Module, condition: Tensor | ConditionState, condition_mask: Tensor | None = None
    ) -> nn.Linear:
        """What :meth:`RoutedLoRA.bake` does, for the update of ``base_layer``."""
        if not ROUTES[self.routing].linear:
            raise UnsupportedError(
                f"{self.label}: routing {self.routing!r} is not linear in its input and cannot be baked"
            )
        if (type(base_layer) is not nn.Linear and not is_conv1d(base_layer)) or not dense(base_layer.weight):
            found = f"{type(base_layer).__name__} with a {type(getattr(base_layer, 'weight', None)).__name__} weight"
            raise UnsupportedError(f"{self.label}: bake needs a dense nn.Linear or Conv1D base, got {found}")
        if hooked(base_layer) or patched(base_layer):
            raise UnsupportedError(f"{self.label}: bake cannot take the base layer's hooks or replaced forward along")
        with torch.no_grad(), reference.no_autocast(self.A.device):
            wide = torch.float64 if self.A.dtype == torch.float64 else torch.float32
            state = None
            if self.routing != "none":
                if isinstance(condition, ConditionState):
                    held = condition
                    held.check_fresh(self.label, self.A if self.C is None else self.C, own=True)
                else:
                    self._refuse_in_sequence()
                    if not isinstance(condition, Tensor):
                        found = type(condition).__name__
                        raise TypeError(f"{self.label}: condition must be a Tensor or a ConditionState, got {found}")
                    held = self._encode(condition.to(wide), condition_mask)
                state = held.tensor.to(wide)
                if state.shape[0] != 1:
                    raise ConditionShapeError(f"{self.label}: bake takes 1 condition, got {state.shape[0]}")
                if state.dim() == 3 and ROUTES[self.routing].state == "tokens":
                    raise UnsupportedError(f"{self.label}: a condition per input token has no single weight to bake")
            options = Options(
                1, self.routing, "state", "none", self.condition_scale, self.groups,
                tuple(bound for pair in self.out_slices or [] for bound in pair), self.out_features, self.scaling,
                0.0, 0.0, "none", False,
            )  # fmt: skip
            # Z = T M + m, read off by routing the identity and zero
            width = self.A.shape[0]
            probe = torch.cat([torch.eye(width, dtype=wide), torch.zeros(1, width, dtype=wide)])[None].to(self.A.device)
            z = reference.route(probe, state, torch.ones(1, width + 1, dtype=torch.bool, device=probe.device), options)
            constant = z[:, width:]
            b = self.B.to(wide)
            through = self.A.to(wide).t() @ (z[0, :width] - constant[0])  # [in, R]
            delta = self.scaling * reference.up_project(through[None], b, options)[0].t()
            shift = self.scaling * reference.up_project(constant, b, options)[0, 0]
            weight = base_layer.weight if type(base_layer) is nn.Linear else base_layer.weight.t()  # type: ignore[operator]
            has_bias = base_layer.bias is not None or self.routing == "add"
            baked = nn.Linear(
                self.in_features, self.out_features, bias=has_bias, device=weight.device, dtype=weight.dtype
            )
            baked.weight.copy_(weight.to(wide) + delta)
            if has_bias:
                baked.bias.copy_(shift if base_layer.bias is None else base_layer.bias.to(wide) + shift)  # type: ignore[operator]
        return baked.requires_grad_(False)

    def extra_repr(self) -> str:
        """The options in the module's printed form."""
        return f"r={self.r}, routing={self.routing!r}, scaling={self.scaling:g}, source={self.condition_source!r}"


class RoutedLoRA(LowRankUpdate):
    """A linear layer with a routed low-rank update: ``out = base(x) + s · ρ(x Aᵀ, y Cᵀ) B̂ᵀ`` (Qu et al., ECCV 2024).

    Drop-in: ``layer.q_proj = RoutedLoRA(layer.q_proj, r=16, routing="gram")``. The base layer is called, never copied;
    whether its own parameters train is left as it is (``attach`` freezes them).

    Args:
        base_layer: nn.Linear, transformers' Conv1D, or any module with ``in_features`` and ``out_features``
            (quantised linear layers).
        r: rank, of each output slice.
        lora_alpha: s = lora_alpha / r, or lora_alpha / sqrt(r) with ``use_rslora``.
        routing: "none", "add", "mul", "expand", "gram", "gram_relu", "cross_gram" or "ones" ("gram_reshape" in the
            reference backend only).
        condition_features: width d_c of the condition for its own projection ``condition_A``; None shares ``lora_A``
            (the paper's form), which needs d_c = in_features.
        condition_source: "external", or "in_sequence": the condition is the input's own rows at condition_mask [B, N].
        condition_pool: "auto" (mean for add, mul, expand, cross_gram; none for the others), "mean", "first", "none".
        condition_scale: "tokens" divides gram, gram_relu and ones by the number of valid condition tokens; "none" does
            not (the paper's formula; the same for one token).
        lora_dropout: dropout probability of x in the update.
        condition_dropout: that of y, with an independent mask; None takes ``lora_dropout``.
        use_rslora: see ``lora_alpha``.
        out_slices: (start, stop) of each output slice to adapt, for a fused qkv; None adapts the whole output.
        route_across_slices: route all slices' bottlenecks as one, as the published GPT-2 path does.
        missing: in a call without a condition "error" raises, "base" runs the frozen layer, "lora" routes nothing
            (Z = T). A sample of a batch that has no valid condition token in it is no such call: its V is 0, so ``add``
            routes nothing for it, and the other routes leave it the frozen layer.
        backend: "auto", "cuda", "cpu" or "reference".

    Parameters (float32 for a float16, bfloat16 or quantised base): ``lora_A`` [R, in], R = r · number of slices;
    ``lora_B`` [adapted outputs, r], zero at first; ``condition_A`` [R, d_c] or None.

    Raises:
        ValueError: an option out of range.
    """

    base_layer: nn.Module
    lora_A: nn.Parameter
    lora_B: nn.Parameter
    condition_A: nn.Parameter | None

    def _hold(self, base_layer: nn.Module) -> None:
        self.base_layer = base_layer

    @classmethod
    def from_features(
        cls,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> RoutedLoRA:
        """A RoutedLoRA around a new ``nn.Linear(in_features, out_features)``; the keywords are the constructor's."""
        return cls(nn.Linear(in_features, out_features, bias=bias, device=device, dtype=dtype), **kwargs)

    @property
    def weight(self) -> Any:
        """The base layer's weight, for modules that read it (T5's ``wo``)."""
        return self.base_layer.weight

    @property
    def bias(self) -> Any:
        """The base layer's bias."""
        return self.base_layer.bias

    def forward(
        self,
        x: Tensor,
        condition: Tensor | ConditionState | None = None,
        condition_mask: Tensor | None = None,
        condition_index: Tensor | None = None,
        *,
        input_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        condition_cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """The base layer's output plus the routed update.

        Args:
            x: [B, N, in] or [B·N, in]; with ``cu_seqlens`` [ΣN_i, in].
            condition: y [B, M, d_c] or [B, d_c], or a state from :meth:`encode_condition`. None reads what
                ``routed_peft.condition`` delivers.
            condition_mask: bool or 0/1 integers [B, M], True where valid; in-sequence [B, N], the positions of x.
            condition_index: int [B], which condition each sample uses. None: its own; and without gradients also where
                x has k times as many samples, of which k in a row share one, as generate() lays out beams.
            input_mask: bool or 0/1 integers [B, N], True where valid; only cross_gram reads it.
            cu_seqlens: int [B + 1], row offsets of a flat x.
            condition_cu_seqlens: the same for a flat y [ΣM_i, d_c].

        Returns:
            [..., out] in the base output's dtype.

        Raises:
            MissingConditionError: no condition, and ``missing="error"``.
            ConditionShapeError: sizes, dtypes or devices do not fit.
            StaleStateError: the state is older than the parameters.
        """
        return self.add_to(
            self.base_layer, x, condition, condition_mask, condition_index, input_mask=input_mask,
            cu_seqlens=cu_seqlens, condition_cu_seqlens=condition_cu_seqlens,
        )  # fmt: skip

    def bake(self, condition: Tensor | ConditionState, condition_mask: Tensor | None = None) -> nn.Linear:
        """One condition fixed for good: the plain ``nn.Linear`` that this layer then is, exactly.

        Args:
            condition: y [1, M, d_c] or [1, d_c], or a state of one condition.
            condition_mask: [1, M].

        Returns:
            A Linear with weight W + s B̂ M A in the base weight's dtype (and a bias where there is one or ``add`` makes
            one). Routes that are not linear in T, and quantised bases, raise UnsupportedError.
        """
        return self.bake_into(self.base_layer, condition, condition_mask)

    def merge(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raises: there is no weight without a condition."""
        no_merge()


class RoutedAdapter(RoutedLayer):
    """A bottleneck Adapter with a routing function: ``out = x + up · act(ρ(down x + b, condition y + b_c)) + b_up``.

    The route comes before the activation (Qu et al., ECCV 2024; placements as in VL-Adapter and PETL-AST).

    Args:
        d_model: width d of input and output.
        r: bottleneck width R.
        routing: as :class:`RoutedLoRA`.
        activation: "gelu" (erf), "gelu_tanh", "relu", "silu" or "none".
        residual: add x to the output.
        bias: biases on every projection.
        condition_features: width d_c of the condition for its own projection; None shares ``down`` and its bias.
        condition_pool: as :class:`RoutedLoRA`.
        condition_scale: as :class:`RoutedLoRA`.
        dropout: dropout probability of x and of y (independent masks).
        missing: without a condition "error" raises, "base" adds nothing (x, or zeros without ``residual``), "lora"
            routes nothing. A sample of a batch that has no valid condition token in it is no such call: its V is 0, and
            what an activation makes of 0 and ``up_bias`` are added.
        backend: "auto", "cuda", "cpu" or "reference".

    Parameters: ``down`` [R, d], ``down_bias`` [R], ``up`` [d, R] (zero at first), ``up_bias`` [d], ``condition_down``
    [R, d_c] and ``condition_bias`` [R] or None.

    Raises:
        ValueError: an option out of range.
    """

    def __init__(
        self,
        d_model: int,
        r: int,
        *,
        routing: str = "gram",
        activation: str = "gelu",
        residual: bool = True,
        bias: bool = True,
        condition_features: int | None = None,
        condition_pool: str = "auto",
        condition_scale: str = "tokens",
        dropout: float = 0.0,
        missing: str = "error",
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(r, routing, condition_pool, condition_scale, missing, backend)
        positive("d_model", d_model)
        if condition_features is not None:
            positive("condition_features", condition_features)
        probability("dropout", dropout)
        self.d_model, self.residual, self.dropout = d_model, residual, dropout
        self.activation = one_of("activation", activation, ACTIVATIONS)

        def parameter(*shape: int, wanted: bool = True) -> nn.Parameter | None:
            return nn.Parameter(torch.zeros(*shape, device=device, dtype=dtype)) if wanted else None

        own = condition_features is not None and routing != "none"
        self.down = parameter(r, d_model)
        self.up = parameter(d_model, r)
        self.down_bias = parameter(r, wanted=bias)
        self.up_bias = parameter(d_model, wanted=bias)
        self.condition_down = parameter(r, condition_features or 0, wanted=own)
        self.condition_bias = parameter(r, wanted=own and bias)
        self.reset_parameters()

    def reset_parameters(self, init: str = "kaiming") -> None:
        """down and condition_down Kaiming-uniform with a = √5 ("kaiming") or N(0, 1/r) ("gaussian"); the rest zero."""
        one_of("init", init, ("kaiming", "gaussian"))
        for projection in (self.down, self.condition_down):
            if projection is not None and init == "kaiming":
                nn.init.kaiming_uniform_(projection, a=math.sqrt(5))
            elif projection is not None:
                nn.init.normal_(projection, std=1 / self.r)
        for zero in (self.up, self.down_bias, self.up_bias, self.condition_bias):
            if zero is not None:
                nn.init.zeros_(zero)

    def forward(
        self,
        x: Tensor,
        condition: Tensor | ConditionState | None = None,
        condition_mask: Tensor | None = None,
        condition_index: Tensor | None = None,
        *,
        input_mask: Tensor | None = None,
    ) -> Tensor:
        """x [B, N, d] or [B·N, d] -> the same shape, and with ``residual`` dtype (autocast is for the products).

        The other arguments and errors as :meth:`RoutedLoRA.forward`.
        """
        given = self._delivered(x, condition, condition_mask, condition_index, input_mask)
        if given is None and self.missing == "base":
            return self._touch(x if self.residual else torch.zeros_like(x), *self.parameters(recurse=False))
        routing = self.routing if given is not None else "none"
        y, mask, index, valid, *_ = given if given is not None else Delivered(None, None, None, None)
        assert self.down is not None and self.up is not None
        out = functional.apply(
            self.label, x, self.down, y, self.up, self.condition_down, bias=self.up_bias, b_down=self.down_bias,
            b_C=self.condition_bias, routing=routing, scaling=1.0, activation=self.activation, residual=self.residual,
            mask=mask, index=index, input_mask=valid, pool=self.condition_pool, scale=self.condition_scale,
            dropout_p=self.condition_p(), own_state=True, backend=self.backend,
        )  # fmt: skip
        return out if given is not None else self._touch(out, self.condition_down, self.condition_bias)

    def condition_p(self) -> float:
        """The dropout probability of the condition: none in eval mode."""
        return self.dropout if self.training else 0.0

    def _projection(self) -> tuple[Tensor, Tensor | None, int]:
        if self.condition_down is not None:
            return self.condition_down, self.condition_bias, 1
        assert self.down is not None
        return self.down, self.down_bias, 1

    def shares_projection(self) -> bool:
        """Whether ``down`` projects the condition too."""
        return self.condition_down is None

    def extra_repr(self) -> str:
        """The options in the module's printed form."""
        return f"d_model={self.d_model}, r={self.r}, routing={self.routing!r}, activation={self.activation!r}"


def no_merge() -> NoReturn:
    """What merging raises."""
    raise UnsupportedError(
        "a routed adapter depends on the condition and has no condition-free merged weight; use bake(condition)"
    )
