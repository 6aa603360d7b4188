"""Pictures in the tests of commands."""

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def unrendered(request, monkeypatch):
    """Every figure is made, but rendered only where a test is marked so: half of the time of a short run."""
    if request.node.get_closest_marker("rendered") is None:
        monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda self, path, **_: Path(path).write_bytes(b""))
