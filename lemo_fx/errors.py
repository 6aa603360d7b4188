"""Every error a user of lemo_fx can cause. Each message names the module or setting and the mend."""


class LemoError(Exception):
    """Base class of all errors raised on purpose by lemo_fx."""


class ConfigError(LemoError, ValueError):
    """A setting of `LemoConfig` or `Elimination` is out of range or contradicts another one."""


class UnsupportedModelError(LemoError, TypeError):
    """The model has no causal decoder layer that lemo_fx can rewrite, or is in a state it cannot work on."""


class CaptureError(LemoError, RuntimeError):
    """A module's forward could not be captured as a graph."""


class GraphCheckError(LemoError, RuntimeError):
    """A rewritten graph breaks an invariant of the passes (see passes/README.md); the model was left as it was."""


class NotTransformedError(LemoError, RuntimeError):
    """The operation needs a model that `lemo_fx.transform` has rewritten."""


class PredictorError(LemoError, ValueError):
    """Predictor or stand-in weights are missing, damaged, or belong to another model."""


class StorageError(LemoError, OSError):
    """A file could not be written: the disk is full, or the folder must not be written to."""


class SelectionError(LemoError, RuntimeError):
    """A recompute asked for a choice of blocks that its forward pass never made."""


class InputError(LemoError, ValueError):
    """A forward pass was given inputs that a rewritten layer cannot work on."""
