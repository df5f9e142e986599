"""Cross-modal parameter-efficient fine-tuning: low-rank layers routed by a condition from another modality."""

from . import functional
from .config import RoutedAdapterConfig, RoutedLoRAConfig
from .delivery import condition
from .errors import (
    AdapterFileError,
    ConditionShapeError,
    MissingConditionError,
    RoutedPeftError,
    StaleStateError,
    UnsupportedError,
)
from .modules import RoutedAdapter, RoutedLoRA
from .ops import build_info, supports
from .state import ConditionState
from .surgery import attach, check, detach, load_adapter, save_adapter

__version__ = "0.1.0"

__all__ = [
    "AdapterFileError",
    "ConditionShapeError",
    "ConditionState",
    "MissingConditionError",
    "RoutedAdapter",
    "RoutedAdapterConfig",
    "RoutedLoRA",
    "RoutedLoRAConfig",
    "RoutedPeftError",
    "StaleStateError",
    "UnsupportedError",
    "attach",
    "build_info",
    "check",
    "condition",
    "detach",
    "functional",
    "load_adapter",
    "save_adapter",
    "supports",
]
