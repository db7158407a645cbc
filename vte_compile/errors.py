"""The exceptions vte_compile raises on purpose; everything else that escapes is a bug."""


class VTEError(Exception):
    """Base of every error vte_compile raises on purpose: catch this to catch them all."""


class PlanError(VTEError, ValueError):
    """A plan is malformed: a bad field, or a plan file that is missing, damaged, unknown or inconsistent.

    The message starts with where (file and field, such as ``vte_plan.json: exits[2].threshold``).
    """


class PlanMismatchError(PlanError):
    """A well-formed plan does not belong to this model: layers, widths or weights differ."""


class UnsupportedModelError(VTEError, TypeError):
    """A model cannot be handled: its decoder is not found, or is built in a way no family knows."""


class CaptureError(VTEError, RuntimeError):
    """Tracing the decoder, or rewriting the traced graph, failed."""


class InputError(VTEError, ValueError):
    """A call's arguments are wrong or contradict each other (shapes, dtypes, masks, sequence layout)."""


class CalibrationError(VTEError, RuntimeError):
    """The data do not support what was asked of them; the message says how many samples would, where any number can."""


class EngineError(VTEError, RuntimeError):
    """An engine's folder cannot be written, or not be loaded: damaged, of another version, for another device."""
