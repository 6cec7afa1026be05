"""Every error the library raises on purpose.

One base class, so that ``except BHRoutingError`` catches all of them; each concrete error is also the
built-in exception a caller would expect (``ValueError``, ``TypeError`` or ``RuntimeError``). Messages say
what was expected, what came, and what to do.
"""


class BHRoutingError(Exception):
    """Base class of the library's errors."""


class InvalidParameterError(BHRoutingError, ValueError):
    """A parameter lies outside its documented range."""


class InvalidInputError(BHRoutingError, ValueError):
    """A tensor has the wrong shape, or holds values that have no meaning here (NaN, infinity)."""


class InvalidTypeError(BHRoutingError, TypeError):
    """A value has the wrong type (for example integer logits)."""


class NoRoutersError(BHRoutingError, RuntimeError):
    """The model has no router that this library can patch."""


class UnsupportedModelError(BHRoutingError, RuntimeError):
    """The model routes, but by a contract that cannot be served; the message says which and why."""


class ModelLoadError(BHRoutingError, RuntimeError):
    """A model cannot be loaded: it is missing, damaged or incomplete."""


class PatchError(BHRoutingError, RuntimeError):
    """Patching or unpatching is not possible in the present state (already patched, for example)."""


class CalibrationError(BHRoutingError, ValueError):
    """A calibration cannot be made, or does not fit what it is used for."""


class CalibrationFileError(CalibrationError):
    """A calibration file is damaged, of another format version, or not a calibration at all."""


class CalibrationMismatchError(CalibrationError):
    """A calibration was made for another model, layer, statistic or temperature."""


class CertificateError(CalibrationError):
    """A certificate cannot be made of these documents, or does not cover what is asked of it."""


class BudgetError(BHRoutingError, ValueError):
    """A budget of experts per token that no level can meet."""


class MissingDependencyError(BHRoutingError, ImportError):
    """An optional package is needed for what was asked; the message names the extra that brings it."""


class ResultsError(BHRoutingError, ValueError):
    """A folder of results is damaged, of another version, or of another model."""


class RoutingLogError(BHRoutingError, ValueError):
    """A file is no routing log of this version, or a damaged one."""


class UnknownPolicyError(BHRoutingError, ValueError):
    """A policy or one of its parameters has a name that does not exist; the message says which exist."""


class DatasetError(BHRoutingError, ValueError):
    """A data set cannot be read, or needs a network that is not there."""


class ServerError(BHRoutingError, RuntimeError):
    """A server did not start, or does not route as it was asked to; the message says what it said."""


class CalibrationWarning(UserWarning):
    """A calibration does less than what was asked for, and the warning says what."""
