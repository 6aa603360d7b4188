"""Long-context fine-tuning with less memory and less time: LeMo's contextual token sparsity as torch.fx passes."""

from typing import TYPE_CHECKING, Any

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
    UnsupportedModelError,
)
from lemo_fx.fit import fit
from lemo_fx.predictors import Predictors
from lemo_fx.report import Report
from lemo_fx.transform import graphs, report, revert, set_dense, transform

if TYPE_CHECKING:
    from lemo_fx.callback import DenseFinish, LemoCallback

__all__ = [
    "CaptureError",
    "ConfigError",
    "DenseFinish",
    "Elimination",
    "GraphCheckError",
    "InputError",
    "LemoCallback",
    "LemoConfig",
    "LemoError",
    "NotTransformedError",
    "PredictorError",
    "Predictors",
    "Report",
    "SelectionError",
    "UnsupportedModelError",
    "__version__",
    "fit",
    "graphs",
    "report",
    "revert",
    "set_dense",
    "transform",
]


def __getattr__(name: str) -> Any:
    # transformers' Trainer is slow to import, and not everyone trains with it.
    if name in ("DenseFinish", "LemoCallback"):
        from lemo_fx import callback

        return getattr(callback, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
