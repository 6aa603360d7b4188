"""Long-context fine-tuning with less memory and less time: LeMo's contextual token sparsity as torch.fx passes."""

import importlib
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
    StorageError,
    UnsupportedModelError,
)

if TYPE_CHECKING:
    from lemo_fx.api import graphs, labels, report, revert, set_dense, shard_sequence, transform
    from lemo_fx.callback import DenseFinish, LemoCallback, SequenceParallelTrainer
    from lemo_fx.fitting.fit import fit
    from lemo_fx.predictors import Predictors
    from lemo_fx.reporting import Report

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
    "SequenceParallelTrainer",
    "StorageError",
    "UnsupportedModelError",
    "__version__",
    "fit",
    "graphs",
    "labels",
    "report",
    "revert",
    "set_dense",
    "shard_sequence",
    "transform",
]

# Imported when first asked for: torch and transformers take seconds, and `lemo-fx --help` needs neither.
_LATE = {
    "DenseFinish": "callback",
    "LemoCallback": "callback",
    "Predictors": "predictors",
    "Report": "reporting",
    "SequenceParallelTrainer": "callback",
    "fit": "fitting.fit",
    "graphs": "api",
    "labels": "api",
    "report": "api",
    "revert": "api",
    "set_dense": "api",
    "shard_sequence": "api",
    "transform": "api",
}


def __getattr__(name: str) -> Any:
    if name not in _LATE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_LATE[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
