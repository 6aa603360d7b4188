"""Long-context fine-tuning with less memory and less time: LeMo's contextual token sparsity as torch.fx passes."""

import importlib
import sys
from types import ModuleType
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
    from lemo_fx.callback import DenseFinish, LemoCallback
    from lemo_fx.fit import fit
    from lemo_fx.predictors import Predictors
    from lemo_fx.report import Report
    from lemo_fx.transform import graphs, report, revert, set_dense, transform

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
    "StorageError",
    "UnsupportedModelError",
    "__version__",
    "fit",
    "graphs",
    "report",
    "revert",
    "set_dense",
    "transform",
]

# Imported when first asked for: torch and transformers take seconds, and `lemo-fx --help` needs neither.
_LATE = {
    "DenseFinish": "callback",
    "LemoCallback": "callback",
    "Predictors": "predictors",
    "Report": "report",
    "fit": "fit",
    "graphs": "transform",
    "report": "transform",
    "revert": "transform",
    "set_dense": "transform",
    "transform": "transform",
}


def __getattr__(name: str) -> Any:
    if name not in _LATE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_LATE[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    def __setattr__(self, name: str, value: Any) -> None:
        # Importing a submodule puts it here under its own name; `lemo_fx.transform` is the function nevertheless.
        if not (name in _LATE and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
