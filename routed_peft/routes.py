"""The table of routing functions: what every layer of the library has to know about each one.

Adding a route starts here (CONTRIBUTING.md lists the other places).
"""

from collections.abc import Collection
from dataclasses import dataclass
from numbers import Integral, Real


@dataclass(frozen=True)
class Route:
    """One routing function ρ.

    Attributes:
        code: the number the C++ ops know it by (``Routing`` in csrc/kernels/params.h).
        pool: what ``pool="auto"`` means for it.
        linear: Z is linear in T once the condition is fixed, so ``bake`` is exact.
        state: what a condition of several unpooled tokens becomes: "matrix" [R, R], "vector" [R] or "tokens" [M, R].
            A pooled condition, or one of a single token, is always a vector.
        causal: the route reads one input token at a time, so it may sit in a causal decoder.
    """

    code: int
    pool: str
    linear: bool
    state: str
    causal: bool = True


ROUTES = {
    "none": Route(0, pool="none", linear=True, state="vector"),
    "add": Route(1, pool="mean", linear=True, state="tokens"),
    "mul": Route(2, pool="mean", linear=True, state="tokens"),
    "expand": Route(3, pool="mean", linear=True, state="tokens"),
    "gram": Route(4, pool="none", linear=True, state="matrix"),
    "gram_relu": Route(5, pool="none", linear=False, state="matrix"),
    "cross_gram": Route(6, pool="mean", linear=False, state="tokens", causal=False),
    "ones": Route(7, pool="none", linear=True, state="vector"),
    # Reference backend only: parity with checkpoints of the published code, which reshapes where the formula
    # transposes.
    "gram_reshape": Route(8, pool="none", linear=True, state="matrix"),
}
POOLS = {"none": 0, "mean": 1, "first": 2}
SCALES = {"none": 0, "tokens": 1}
SOURCES = {"none": 0, "tokens": 1, "state": 2, "in_sequence": 3}
ACTIVATIONS = {"none": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3, "silu": 4}


def one_of(name: str, value: object, allowed: Collection[str]) -> str:
    """``value`` if it is among ``allowed``; otherwise a ValueError that names the argument and the choices."""
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
    return value


def number(name: str, value: object) -> None:
    """A ValueError that names the argument, unless ``value`` is a number."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ValueError(f"{name} must be a number, got {value!r}")


def positive(name: str, value: object) -> None:
    """A ValueError that names the argument, unless ``value`` is an integer from 1 on."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}")


def probability(name: str, value: object) -> None:
    """A ValueError that names the argument, unless ``value`` is a number in [0, 1]."""
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= float(value) <= 1:
        raise ValueError(f"{name} must lie in [0, 1], got {value!r}")


def resolve_pool(routing: str, pool: str) -> str:
    """The pooling that ``pool`` stands for under ``routing`` ("auto" depends on the route)."""
    if pool == "auto":
        return ROUTES[routing].pool
    return one_of("condition_pool", pool, ("auto", *POOLS))


def state_kind(routing: str, pool: str, pooled_to_one: bool) -> str:
    """The form of the state for a resolved ``pool``: "vector", "matrix" or "tokens".

    ``pooled_to_one`` says that the condition has exactly one token anyway.
    """
    if routing == "gram_reshape":
        return "matrix"
    return "vector" if pooled_to_one or pool != "none" else ROUTES[routing].state
