"""Modules that compute otherwise for the time of a with block."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from torch import nn


@contextmanager
def forwards(instead: Mapping[nn.Module, Callable]) -> Iterator[None]:
    """Each module runs its function in the place of its class's forward."""
    for module, function in instead.items():
        module.forward = function
    try:
        yield
    finally:
        for module in instead:
            del module.forward
