"""How a condition reaches the routed layers of a model: one slot per model, and who fills it.

Layers read only their slot. It is filled by :func:`condition`, by the keywords of the model's own call
(``CallKeywords``) or by a tap (``taps``). What a slot holds belongs to one thread.

Gradient checkpointing runs a layer a second time, during the backward pass: perhaps in another thread, and after the
model has seen other conditions. So a checkpointed segment takes the condition of its own forward along, as an argument
of the checkpointed function (``BoundCheckpoint``), and a layer that is recomputed without one raises instead of using
whatever the slot holds by then.

A generation calls the model once for each token, with one key/value cache. What the layers encode of the condition at
the first call is kept with that cache (``Memory``) for the others.
"""

from __future__ import annotations

import inspect
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from .errors import ConditionShapeError, MissingConditionError, RoutedPeftError, UnsupportedError
from .functional import compute_dtype
from .state import ConditionState

if TYPE_CHECKING:
    from .joint import Handed, JointLayers, Part
    from .modules import RoutedLayer


class Delivered(NamedTuple):
    """One call's condition, as the layers take it."""

    condition: Tensor | ConditionState | None
    mask: Tensor | None
    index: Tensor | None  # type: ignore[assignment]  # hides tuple.index, which nobody needs here
    input_mask: Tensor | None
    states: States | None = None  # where the layers keep what they encode of it, during a generation
    recalled: bool = False  # of an earlier call with the same cache, where in-sequence rows were marked
    joint: Handed | None = None  # the layers' states of it, projected together

    def is_empty(self) -> bool:
        """Whether there is no condition in it, only perhaps an input mask."""
        return self.condition is None and self.mask is None and self.states is None and not self.recalled


class Held(NamedTuple):
    """What a slot holds in one thread, and since when."""

    value: Delivered | None = None
    task: int = -1  # the backward pass that was running when it was set, -1 for none
    explicit: bool = False  # given by the user, so that no tap replaces it

    @property
    def tapped(self) -> bool:
        """Whether a tap delivered it."""
        return not self.explicit and self.value is not None and not self.value.is_empty()


def running_backward() -> int:
    """Which backward pass is running in this thread, -1 for none; what is being traced is a forward."""
    return -1 if torch.compiler.is_compiling() else torch._C._current_graph_task_id()


class Slot:
    """Holds the condition of the running call, for each thread its own.

    ``holding`` is for callers that can wrap a call, ``enter`` and ``leave`` for hooks before and after it.
    Never part of a state dict; a deep copy or an unpickled slot is a new, empty one (shared by the copied layers).
    """

    def __init__(self) -> None:
        self._local = threading.local()

    def read(self, reader: Any) -> Delivered | None:
        """The condition of the running call, for the layer ``reader``, whose ``label`` errors give; None if there is
        none.

        Raises:
            MissingConditionError: a backward pass is running and the slot was filled outside of it.
        """
        if self.outlived():
            raise MissingConditionError(
                f"{reader.label}: no condition during recomputation: checkpointing was enabled by a function "
                "routed_peft did not bind; pass the condition as an argument of the layer"
            )
        return self.value()

    def held(self) -> Held:
        """What this thread's slot holds."""
        # Never an object that lies elsewhere too: torch.compile would take the two places for one, and ask in later
        # calls what the other one holds.
        found: Held | None = getattr(self._local, "held", None)
        return Held() if found is None else found

    def value(self) -> Delivered | None:
        """The condition that this thread's slot holds."""
        return self.held().value

    def outlived(self) -> bool:
        """Whether a backward pass is running that the content of the slot (be it nothing) was not set in.

        A layer that runs then is being recomputed, and its forward may have had another condition.
        """
        task = running_backward()
        return task != -1 and task != self.held().task

    @contextmanager
    def holding(self, value: Delivered | None) -> Iterator[None]:
        """Hold ``value``; afterwards, also after an exception, what was held before."""
        local = self._local
        before = self.held(), self.base()
        mine = local.base = Held(value, running_backward(), explicit=value is not None)
        local.held = Held(*mine)
        try:
            yield
        finally:
            if local.base is not mine:  # a generator or task that was left between another one's beginning and end
                local.held, local.base = Held(), Held()
                raise RoutedPeftError("conditions were left in another order than they were entered")
            local.held, local.base = before

    def base(self) -> Held:
        """What the innermost ``holding`` holds."""
        found: Held | None = getattr(self._local, "base", None)
        return Held() if found is None else found

    def enter(self) -> None:
        """Until ``leave`` what is held may change, and comes back then; calls nest."""
        local = self._local
        local.frames = (Held(*self.held()), getattr(local, "frames", None))

    def hold(self, held: Held) -> None:
        """Hold ``held`` for the rest of the call that was entered last."""
        self._local.held = Held(*held)

    def fill(self, value: Delivered) -> None:
        """``hold`` a tapped ``value``."""
        self.hold(Held(value, running_backward()))

    def leave(self) -> None:
        """Hold what was held before the last ``enter``."""
        local = self._local
        frames = getattr(local, "frames", None)
        if frames is not None:  # None: another hook raised before ours could enter
            local.held, local.frames = frames

    def in_call(self) -> bool:
        """Whether a call was entered and not left."""
        return getattr(self._local, "frames", None) is not None

    @contextmanager
    def generation(self) -> Iterator[None]:
        """While a ``generate`` runs, which may call parts of the model without calling the model."""
        local = self._local
        before = self.in_generation()
        local.generation = True
        try:
            yield
        finally:
            local.generation, local.arrival = before, None

    def in_generation(self) -> bool:
        """Whether a ``generate`` is running."""
        return getattr(self._local, "generation", False)

    @property
    def arrival(self) -> Tensor | None:
        """What a tap has found in the running call, for the part of it that is still to come."""
        return getattr(self._local, "arrival", None)

    @arrival.setter
    def arrival(self, found: Tensor | None) -> None:
        self._local.arrival = found

    @property
    def shown(self) -> Tensor | None:
        """Which rows of the running call have an image in them, bool [batch], where a tap could tell."""
        return getattr(self._local, "shown", None)

    @shown.setter
    def shown(self, rows: Tensor | None) -> None:
        self._local.shown = rows

    def __deepcopy__(self, memo: dict[int, Any]) -> Slot:
        return Slot()  # deepcopy's memo makes the copied layers share it

    def __reduce__(self) -> tuple[type[Slot], tuple[()]]:
        return Slot, ()


@contextmanager
def condition(
    model: nn.Module,
    y: Tensor | ConditionState | None,
    mask: Tensor | None = None,
    *,
    index: Tensor | None = None,
    input_mask: Tensor | None = None,
) -> Iterator[None]:
    """Deliver a condition to every routed layer of ``model`` for the calls inside the ``with``.

    Nests (the outer condition comes back afterwards), holds for the current thread only, and ends with an exception
    too.
    The model need not be attached: layers put in by hand are found as well.

    Args:
        model: the model, or any module with routed layers in it.
        y: the condition [B, M, d_c] or [B, d_c], or a ConditionState of the model's only routed layer. None for
            in-sequence layers, which take only ``mask``.
        mask: bool or 0/1 integers [B, M], True where a condition token is valid; in-sequence [B, N].
        index: int [B], which condition each sample uses.
        input_mask: bool or 0/1 integers [B, N], True where an input token is valid; only cross_gram reads it.

    Raises:
        RoutedPeftError: ``model`` holds no routed layer.
        TypeError: ``y`` is none of the above.
    """
    if not (y is None or isinstance(y, (Tensor, ConditionState))):
        raise TypeError(f"condition takes a Tensor, a ConditionState or None, got {type(y).__name__}")
    slots = slots_of(model)
    if not slots:
        raise RoutedPeftError(
            f"{type(model).__name__} holds no routed layer to give a condition to; call routed_peft.attach first, "
            "or put RoutedLoRA or RoutedAdapter layers into it"
        )
    bind_checkpoints(model, slots)
    with ExitStack() as stack:
        for slot in slots:
            stack.enter_context(slot.holding(Delivered(y, mask, index, input_mask)))
        yield


def slots_of(model: nn.Module) -> list[Slot]:
    """The slots that the routed layers in ``model`` read: one, unless parts of it were attached on their own.

    Layers without a slot are linked to one first.
    """
    from .modules import RoutedLayer  # modules needs this file

    layers = [module for module in model.modules() if isinstance(module, RoutedLayer)]
    slots = {id(layer.slot): layer.slot for layer in layers if layer.slot is not None}
    for layer in layers:
        if layer.slot is None:
            layer.slot = next(iter(slots.values()), None) or Slot()
            slots[id(layer.slot)] = layer.slot
    return list(slots.values())


# ------------------------------------------------------------------------------------------------ generation
_TWICE = object()


class States:
    """What the layers have encoded of one condition, so that the steps of a generation do not encode it again.

    ``owned`` says that nobody else can write the condition's tensors.
    """

    def __init__(self, owned: bool = False) -> None:
        self.owned = owned
        # By identity, which is faster than a WeakKeyDictionary; the layer beside it says whether it is still that one.
        self._kept: dict[int, tuple[weakref.ref[RoutedLayer], ConditionState, Any]] = {}

    def _of(self, layer: RoutedLayer) -> tuple[Any, Any]:
        """The state that ``layer`` kept, and under which key."""
        kept = self._kept.get(id(layer))
        return kept[1:] if kept is not None and kept[0]() is layer else (None, None)

    def find(self, layer: RoutedLayer, key: Any) -> ConditionState | None:
        """The state that ``layer`` kept under an equal ``key``."""
        state, kept_under = self._of(layer)
        return state if kept_under == key else None

    def keep_once(self, layer: RoutedLayer, key: Any, state: ConditionState) -> ConditionState:
        """``keep``, for a state that is made of the layer's own input; of two runs in a call, none can be kept."""
        return self.keep(layer, key if self._of(layer)[0] is None else _TWICE, state)

    def ran_twice(self, layer: RoutedLayer) -> bool:
        """Whether ``layer`` made more than one state in the prompt's call."""
        return self._of(layer)[1] is _TWICE

    def keep(self, layer: RoutedLayer, key: Any, state: ConditionState) -> ConditionState:
        """Keep ``state`` for ``layer`` in place of an earlier one."""
        if id(layer) not in self._kept:  # those of layers that are gone, as replicas are after each call
            self._kept = {number: kept for number, kept in self._kept.items() if kept[0]() is not None}
        self._kept[id(layer)] = weakref.ref(layer), state, key
        return state


def _is_source(source: weakref.ref[Any] | None, tensor: Any) -> bool:
    """Whether the reference is to this tensor; one to a tensor that is gone is to none, not even to None."""
    return tensor is None if source is None else tensor is not None and source() is tensor


class Memory:
    """What a key/value cache remembers for one slot: the condition its prompt had.

    It lives and dies with the cache, so two generations that take turns keep apart, and follows what is done to the
    cache (``_Followed``): other rows have the condition of the rows that they were, and a cache that lost marked tokens
    has lost their condition.
    """

    def __init__(self) -> None:
        self.tapped: Delivered | None = None  # what a tap delivered for the prompt
        self.version: int | None = None
        self._sources: tuple[Any, ...] = ()
        self._states = States()
        self.start_over(0)

    def start_over(self, batch: int, marked: Tensor | None = None, start: int = 0) -> None:
        """The condition to remember from now on is that of ``batch`` rows, and made of the tokens that ``marked``
        [batch, N] marks from position ``start`` of the cache on, if given."""
        self._batch, self._marked, self._start = batch, marked, start
        self._rows: Tensor | None = None  # which of the first rows each row of the cache is; None if they never moved
        self._lost = False

    def remember(self, value: Delivered, batch: int, marked: Tensor | None, version: int | None = None) -> None:
        """``start_over`` with what a tap delivered, and perhaps the version of the tensor it made that from."""
        self.tapped, self.version = value._replace(joint=None), version  # that is of one call
        self.start_over(batch, marked)

    def forget(self) -> None:
        """There is nothing to recall, nor to follow."""
        self.tapped = None
        self.start_over(0)

    def recall(self, of: str) -> Delivered:
        """The tapped value, for a call with the cache as it is now. ``of`` says in errors whose condition it is.

        Raises:
            UnsupportedError: marked tokens are no longer in the cache.
        """
        assert self.tapped is not None
        y, mask, index, *_ = self.tapped
        conditions = self._batch if y is None or isinstance(y, ConditionState) else y.shape[0]
        return self.tapped._replace(
            # In sequence the marked rows were in the earlier call, and the layers kept their states.
            mask=None if y is None else mask, index=self.rows(of, index, conditions), recalled=True,
        )  # fmt: skip

    def rows(self, of: str, index: Tensor | None, conditions: int) -> Tensor | None:
        """Which of ``conditions`` each row of the cache uses, if ``index`` says so for the rows of the prompt.

        Raises:
            UnsupportedError: as ``recall``.
        """
        if self._lost:
            raise UnsupportedError(
                f"{of}: the cache was cropped, and tokens that the condition was made of are gone; start with a new one"
            )
        if self._rows is None:
            return index
        return self._rows // (self._batch // max(conditions, 1)) if index is None else index[self._rows]

    def follow(self, method: str, argument: Any, length: int) -> None:
        """``method`` was called on the cache with ``argument``; it holds ``length`` tokens now."""
        if not self._batch:
            return
        if method == "crop":
            if self._marked is not None and length < self._start + self._marked.shape[1]:
                self._lost = self._lost or bool(self._marked[:, max(length - self._start, 0) :].any())
            return
        if self._rows is None:
            device = argument.device if isinstance(argument, Tensor) else None
            self._rows = torch.arange(self._batch, device=device)
        if method == "batch_repeat_interleave":
            self._rows = self._rows.repeat_interleave(argument)
        else:
            self._rows = self._rows[argument]

    def states_for(
        self, *tensors: Tensor | ConditionState | None, fresh: bool, owned: bool = False
    ) -> tuple[States, bool]:
        """The states of the condition that is made of ``tensors``, and whether it was met before.

        Only the very same tensors count as the same condition. ``fresh``: nothing that was before counts, for instance
        because the cache is empty.
        """
        met = not fresh and len(self._sources) == len(tensors) and all(map(_is_source, self._sources, tensors))
        if not met:
            self._sources = tuple(None if t is None else weakref.ref(t) for t in tensors)
            self._states = States(owned)
        return self._states, met


class _Memories:
    """A cache's memories, by slot. A deep copy of the cache, as of a shared prompt, remembers the same."""

    def __init__(self) -> None:
        self.by_slot: weakref.WeakKeyDictionary[Slot, Memory] = weakref.WeakKeyDictionary()

    def __deepcopy__(self, memo: dict[int, Any]) -> _Memories:
        twin = _Memories()
        for slot, memory in self.by_slot.items():
            copied = twin.by_slot[slot] = Memory()
            copied.__dict__.update(memory.__dict__)
        return twin

    def __reduce__(self) -> tuple[type[_Memories], tuple[()]]:
        return _Memories, ()


class _Followed:
    """A cache's method that moves its rows or drops tokens: what the cache remembers follows.

    An object and not a closure, so that a copied or pickled cache gets its own.
    """

    METHODS = ("reorder_cache", "batch_select_indices", "batch_repeat_interleave", "crop")

    def __init__(self, cache: Any, name: str) -> None:
        # Weak, so that a cache, which may be large, is freed with its last user and not by a garbage collection.
        self.cache, self.__name__ = weakref.ref(cache), name  # transformers asks its methods for their names

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the cache's method would have returned."""
        cache = self.cache()
        if cache is None:
            raise RoutedPeftError(f"{self.__name__} of a shallow copy of a cache that is gone; copy.deepcopy caches")
        out = getattr(type(cache), self.__name__)(cache, *args, **kwargs)
        length = int(cache.get_seq_length()) if self.__name__ == "crop" else 0
        for memory in cache._routed_peft.by_slot.values():
            memory.follow(self.__name__, next(iter((*args, *kwargs.values()))), length)
        return out

    def __reduce__(self) -> tuple[type[_Followed], tuple[Any, str]]:
        return _Followed, (self.cache(), self.__name__)


_CACHE = ("cache", "past_key_values")  # the second up to transformers 5.23


def cache_in(kwargs: Mapping[str, Any]) -> Any:
    """The KV cache among the arguments of a model's call, or None."""
    return next((kwargs[name] for name in _CACHE if kwargs.get(name) is not None), None)


def cache_of(out: Any) -> Any:
    """The KV cache in what a model's call gave, or None."""
    found = (getattr(out, name, None) for name in _CACHE)
    return next((cache for cache in found if cache is not None), None)


def memory_of(cache: Any, slot: Slot) -> Memory | None:
    """What ``cache`` (a transformers Cache) remembers for ``slot``; None if there is no such cache."""
    if not hasattr(cache, "get_seq_length"):
        return None
    own = cache.__dict__
    if "_routed_peft" not in own:
        own["_routed_peft"] = _Memories()
        own.update({name: _Followed(cache, name) for name in _Followed.METHODS if hasattr(type(cache), name)})
    memories = own["_routed_peft"].by_slot
    if slot not in memories:
        memories[slot] = Memory()
    return memories[slot]  # type: ignore[no-any-return]


def is_empty(cache: Any) -> bool:
    """Whether a cache holds no token (a None is empty too).

    A static cache counts on its device, so asking waits for it.
    """
    return cache is None or int(cache.get_seq_length()) == 0


def with_states(value: Delivered, cache: Any, slot: Slot) -> Delivered:
    """``value``, with states to keep what is encoded of it for the next call with the same cache."""
    memory = None if torch.compiler.is_compiling() else memory_of(cache, slot)
    if memory is None or (value.condition is None and value.mask is None):
        return value
    if value.condition is not None:  # which row has which condition is said in each call
        return value._replace(states=memory.states_for(value.condition, value.mask, fresh=False)[0])
    assert value.mask is not None
    start = 0 if cache is None else int(cache.get_seq_length())
    states, met = memory.states_for(None, value.mask, fresh=start == 0)
    if not met:
        memory.start_over(value.mask.shape[0], value.mask, start)
        return value._replace(states=states)
    index = memory.rows("routed_condition_mask", None, value.mask.shape[0])
    return value._replace(mask=None, index=index, states=states, recalled=True)  # the rows were in an earlier call


# ------------------------------------------------------------------------------------------------ the call's keywords
KEYWORDS = ("routed_condition", "routed_condition_mask", "routed_condition_index", "routed_input_mask")


class CallKeywords:
    """``routed_condition=`` and its companions on a module's own call, and through ``generate``.

    Hooks take the keywords off the call and fill the slot. ``forward`` and ``generate`` only say in their signatures
    that the keywords exist (generate and Trainer ask ``forward``) and call what was there before. So another patch of
    ``forward`` works, whether it was made before or comes later.
    """

    def __init__(self, module: nn.Module, slot: Slot, joint: JointLayers | None = None, inner: bool = False) -> None:
        self.module, self.slot, self.joint = module, slot, joint
        self.inner = inner  # a part of the model: a call of the whole that surrounds it goes on
        self.handles = [
            module.register_forward_pre_hook(self.before, prepend=True, with_kwargs=True),
            module.register_forward_hook(self.after, always_call=True),
        ]
        self.methods = [Advertised(module, "forward"), Replicate(module, "_replicate_for_data_parallel")]
        if callable(getattr(module, "generate", None)):
            self.methods.append(Generate(module, slot))

    def before(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Forward pre-hook: what was given holds for this call; nothing given is what a ``with`` around it gives."""
        within = self.inner and self.slot.in_call()
        self.slot.enter()  # first: ``after`` leaves what this enters, whatever is raised here
        y, mask, index, input_mask = (kwargs.get(name) for name in KEYWORDS)
        kwargs = {name: value for name, value in kwargs.items() if name not in KEYWORDS}
        if not (y is None or isinstance(y, (Tensor, ConditionState))):
            raise TypeError(f"routed_condition takes a Tensor, a ConditionState or None, got {type(y).__name__}")
        if index is not None and y is None:
            raise ConditionShapeError("routed_condition_index goes with routed_condition, which was not given")
        if index is not None and getattr(module, "_is_replica", False):
            raise UnsupportedError(
                "nn.DataParallel splits routed_condition over its devices, and routed_condition_index would point into "
                "a part of it; give each row its own condition, routed_condition=y[index]"
            )
        # Not what the slot holds: a call that broke off under torch.compile, which drops hooks on errors, leaves that.
        held = self.slot.held() if within else self.slot.base()
        if y is not None or mask is not None:
            held = Held(Delivered(y, mask, index, input_mask), running_backward(), explicit=True)
        elif input_mask is not None:
            value = held.value or Delivered(None, None, None, None)
            held = held._replace(value=value._replace(input_mask=input_mask))
        if held.explicit and held.value is not None:
            value = with_states(held.value, cache_in(kwargs), self.slot)
            if self.joint is not None and value.joint is None:
                value = self.joint.begin(value)
            held = held._replace(value=value)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            bind_checkpoints(module, slots_of(module))  # enabled again since, perhaps (Trainer does that)
        self.slot.hold(held)
        return args, kwargs

    def after(self, module: nn.Module, args: Any, out: Any) -> None:
        """Forward hook, after an exception too: the condition ends with the call."""
        self.slot.leave()
        if not self.inner:
            self.slot.arrival = None

    def remove(self) -> None:
        """Undo it; a patch of ``forward`` that was made since stays, and still works."""
        for handle in self.handles:
            handle.remove()
        for method in self.methods:
            method.remove()


class Advertised:
    """A module's method that says in its signature that it takes the keywords, and is else the one it was.

    An object and not a closure, so that a deep-copied or pickled module gets its own.
    """

    def __init__(self, module: nn.Module, name: str) -> None:
        self.module, self.name = module, name
        self.replaced = module.__dict__.get(name)  # what another patch had put there
        module.__dict__[name] = self

    @property
    def __signature__(self) -> inspect.Signature:
        signature = inspect.signature(self._method())
        parameters = list(signature.parameters.values())
        named = [p for p in parameters if p.kind != p.VAR_KEYWORD and p.name not in KEYWORDS]
        rest = [p for p in parameters if p.kind == p.VAR_KEYWORD]
        more = [inspect.Parameter(keyword, inspect.Parameter.KEYWORD_ONLY, default=None) for keyword in KEYWORDS]
        return signature.replace(parameters=[*named, *more, *rest])

    @property
    def __code__(self) -> Any:
        """Where torch.export says that the model comes from."""
        return getattr(self._method(), "__code__", Advertised.__call__.__code__)

    def _method(self) -> Callable[..., Any]:
        if self.replaced is not None:
            return self.replaced  # type: ignore[no-any-return]
        return getattr(type(self.module), self.name).__get__(self.module)  # type: ignore[no-any-return]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the module's method would have returned."""
        if self.replaced is not None:
            return self.replaced(*args, **kwargs)
        # not by the bound method, which a compiler that goes on after a graph break looks up on the module again
        return getattr(type(self.module), self.name)(self.module, *args, **kwargs)

    def remove(self) -> None:
        """Put back what was there, unless somebody else has replaced this by now."""
        own = self.module.__dict__
        if own.get(self.name) is self:
            del own[self.name]
            if self.replaced is not None:
                own[self.name] = self.replaced


class Replicate(Advertised):
    """nn.DataParallel's replicas, which share the module's own attributes, get a ``forward`` of their own."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The replica."""
        replica = super().__call__(*args, **kwargs)
        for name in ("forward", self.name):
            if isinstance(replica.__dict__.get(name), Advertised):
                del replica.__dict__[name]
        return replica


class Generate(Advertised):
    """``generate`` with the keywords.

    What a tap finds in it, for a call of the language model that then does not come, ends with it.
    """

    def __init__(self, module: nn.Module, slot: Slot) -> None:
        super().__init__(module, "generate")
        self.slot = slot

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Generate."""
        y, mask, index, _ = (kwargs.get(name) for name in KEYWORDS)
        if index is not None and isinstance(y, Tensor):
            # generate repeats every tensor for its beams; an index into repeated rows would point to wrong ones.
            prompt = kwargs.get("input_ids", args[0] if args else None)
            rows = _checked_index(type(self.module).__name__, index, y, prompt).to(torch.int64)
            kwargs.update(routed_condition=y[rows], routed_condition_mask=None if mask is None else mask[rows])
            del kwargs["routed_condition_index"]
        with self.slot.generation():
            return super().__call__(*args, **kwargs)


def _checked_index(name: str, index: Any, y: Tensor, prompt: Any) -> Tensor:
    """``index`` as the layers would take it, had they seen it with the prompt."""
    if (
        not isinstance(index, Tensor)
        or index.dim() != 1
        or index.is_floating_point()
        or index.is_complex()
        or index.dtype == torch.bool
    ):
        got = f"{index.dtype} {tuple(index.shape)}" if isinstance(index, Tensor) else type(index).__name__
        raise ConditionShapeError(f"{name}: routed_condition_index must be integers [batch], got {got}")
    if isinstance(prompt, Tensor) and prompt.shape[0] != index.shape[0]:
        raise ConditionShapeError(
            f"{name}: input batch {prompt.shape[0]} does not match routed_condition_index {tuple(index.shape)}"
        )
    if index.device.type == "cpu" and index.numel():
        low, high = (int(t) for t in index.aminmax())
        if low < 0 or high >= y.shape[0]:
            raise ConditionShapeError(
                f"{name}: routed_condition_index {low if low < 0 else high} is out of range for {y.shape[0]} conditions"
            )
    return index


# ------------------------------------------------------------------------------------------------ checkpointing
_FUNCTION = "_gradient_checkpointing_func"  # where transformers keeps it, on the models and layers that checkpoint


class BoundCheckpoint:
    """A model's checkpoint function that takes the condition along: what it recomputes sees the forward's condition.

    The condition's tensor travels as an argument of the checkpointed function, for a reentrant checkpoint lets
    gradients through its arguments only (think of a trainable projector that makes y); masks and indices come along by
    closure.
    An object and not a closure, so that a deep-copied model's function refers to the copy's slots.
    """

    def __init__(self, function: Callable[..., Any], slots: list[Slot]) -> None:
        self.function, self.slots = function, slots

    def __call__(self, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Checkpoint ``run(*args)`` with the conditions that the slots hold now."""
        if torch.compiler.is_compiling():  # the tracer refuses the slot's side effects, and its graph has y as an input
            return self.function(run, *args, **kwargs)
        # A slot filled before the running backward says nothing about this recomputation: the layers shall refuse it.
        # A reentrant segment runs a backward of its own. A matrix that is used in it and in the joint product would get
        # its gradient in two steps, and whoever waits for the gradient (DDP) takes the first for all of it.
        reentrant = getattr(self.function, "keywords", {}).get("use_reentrant", True)
        taken = [
            (slot, value, [part for part in _joint_parts(value, args) if not (reentrant and part.shared)])
            for slot, value in ((slot, slot.value()) for slot in self.slots if not slot.outlived())
        ]

        def bound(*inputs: Any, **keywords: Any) -> Any:
            rest = iter(inputs)
            with ExitStack() as stack:
                for slot, value, parts in taken:
                    stack.enter_context(slot.holding(_with_tensors(value, parts, rest)))
                return run(*rest, **keywords)

        tensors = [t for _, value, parts in taken for t in (_tensor_of(value), *(part.tensor for part in parts))]
        return self.function(bound, *tensors, *args, **kwargs)


def bind_checkpoints(model: nn.Module, slots: list[Slot]) -> None:
    """Wrap the checkpoint functions that transformers left on the modules of ``model``; again changes nothing."""
    if torch.compiler.is_compiling():
        return
    for module in model.modules():
        function = module.__dict__.get(_FUNCTION)
        if isinstance(function, BoundCheckpoint):
            function.slots.extend(slot for slot in slots if not any(slot is known for known in function.slots))
        elif function is not None:
            module.__dict__[_FUNCTION] = BoundCheckpoint(function, list(slots))


def unbind_checkpoints(model: nn.Module) -> None:
    """Give the modules of ``model`` their own checkpoint functions back."""
    for module in model.modules():
        function = module.__dict__.get(_FUNCTION)
        if isinstance(function, BoundCheckpoint):
            module.__dict__[_FUNCTION] = function.function


def _tensor_of(value: Delivered | None) -> Tensor | None:
    y = None if value is None else value.condition
    return y.tensor if isinstance(y, ConditionState) else y


def _joint_parts(value: Delivered | None, args: Sequence[Any]) -> Sequence[Part]:
    """What was made of the condition for all layers, in the dtype that layers compute in which are given ``args``."""
    given = next((arg for arg in args if isinstance(arg, Tensor) and arg.is_floating_point()), None)
    return [] if value is None or value.joint is None or given is None else value.joint.parts(compute_dtype(given))


def _with_tensors(value: Delivered | None, parts: Sequence[Part], tensors: Iterator[Tensor | None]) -> Delivered | None:
    """``value`` with the next of the tensors that the checkpointed function was given, in place of its own."""
    tensor = next(tensors)
    if value is None:
        return None
    if tensor is not None:
        y = value.condition
        state = ConditionState(y.routing, tensor, y.versions) if isinstance(y, ConditionState) else None
        value = value._replace(condition=tensor if state is None else state)
    if value.joint is not None:
        value = value._replace(
            joint=value.joint.handed(parts, [t for _, t in zip(parts, tensors, strict=False) if t is not None])
        )
    return value
