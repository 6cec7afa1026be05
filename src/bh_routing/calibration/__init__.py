"""What a model's routers do on a text, and every null, table and level that follows from it."""

from typing import TYPE_CHECKING

from .._lazy import lazy_names

if TYPE_CHECKING:
    from .calibration import Calibration
    from .passes import calibrate

__all__ = ["Calibration", "calibrate"]

__getattr__, __dir__ = lazy_names(globals(), {"Calibration": "calibration", "calibrate": "passes"})
