"""The exceptions of routed_peft. Each one subclasses RoutedPeftError; shape errors are ValueErrors too."""


class RoutedPeftError(RuntimeError):
    """Base class of everything routed_peft raises on its own account."""


class MissingConditionError(RoutedPeftError):
    """A routed layer ran, and nobody told it the condition."""


class ConditionShapeError(RoutedPeftError, ValueError):
    """Sizes, dtypes or devices of the input, the condition, a mask or an index do not fit together."""


class StaleStateError(RoutedPeftError):
    """A ConditionState is older than the parameters it was encoded with."""


class UnsupportedError(RoutedPeftError):
    """The operation has no meaning for a routed layer, or the chosen backend lacks it."""


class AdapterFileError(RoutedPeftError):
    """A saved adapter does not fit the model, or something trainable would not be saved."""
