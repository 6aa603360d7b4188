"""Long-context fine-tuning with less memory and less time: LeMo's contextual token sparsity as torch.fx passes."""

from lemo_fx._version import __version__
from lemo_fx.config import Elimination, LemoConfig
from lemo_fx.errors import (
    CaptureError,
    ConfigError,
    GraphCheckError,
    InputError,
    LemoError,
    NotTransformedError,
    PredictorError,
    SelectionError,
    StorageError,
    UnsupportedModelError,
)
from lemo_fx.fit import fit
from lemo_fx.predictors import Predictors
from lemo_fx.report import Report
from lemo_fx.transform import graphs, report, revert, transform

__all__ = [
    "CaptureError",
    "ConfigError",
    "Elimination",
    "GraphCheckError",
    "InputError",
    "LemoConfig",
    "LemoError",
    "NotTransformedError",
    "PredictorError",
    "Predictors",
    "Report",
    "SelectionError",
    "StorageError",
    "UnsupportedModelError",
    "__version__",
    "fit",
    "graphs",
    "report",
    "revert",
    "transform",
]
