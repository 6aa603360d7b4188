"""What is built holds what is in the tree; lemo_fx/passes and lemo_fx/kernels are links to folders at the root."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import lemo_fx

ROOT = Path(__file__).parents[1]
BUILD = "from setuptools import build_meta; build_meta.build_{kind}({out!r})"


def run(folder: Path, *command: str, **environment: str) -> str:
    settings = {**os.environ, **environment}
    done = subprocess.run(
        [sys.executable, *command], cwd=folder, capture_output=True, text=True, check=False, env=settings
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def files(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


def test_wheel_and_sdist(tmp_path):
    tree, out = tmp_path / "tree", str(tmp_path)
    tree.mkdir()
    ignore = shutil.ignore_patterns("__pycache__")
    for name in ("lemo_fx", "passes", "kernels"):
        shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=ignore)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)

    script = "; ".join(BUILD.format(kind=kind, out=out) for kind in ("sdist", "wheel"))
    run(tree, "-c", script)
    name = f"lemo_fx-{lemo_fx.__version__}"
    wheel = tmp_path / f"{name}-py3-none-any.whl"
    held = files(wheel)
    expected = {
        str(path.relative_to(tree))
        for folder, _, names in os.walk(tree / "lemo_fx", followlinks=True)
        for path in (Path(folder) / n for n in names)
    } - {"lemo_fx/passes/README.md"}
    assert held == expected
    assert {"lemo_fx/py.typed", "lemo_fx/passes/pipeline.py", "lemo_fx/kernels/eliminate/triton.py"} <= held
    assert {"lemo_fx/demo_assets/model/model.safetensors", "lemo_fx/demo_assets/documents/LICENSES.md"} <= held

    with tarfile.open(tmp_path / f"{name}.tar.gz") as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    again = tmp_path / "again"
    run(tmp_path / "unpacked" / name, "-c", BUILD.format(kind="wheel", out=str(again)))
    assert files(again / wheel.name) == held

    # A pure wheel is installed by unpacking it.
    installed = tmp_path / "installed"
    with zipfile.ZipFile(again / wheel.name) as archive:
        archive.extractall(installed)
        metadata = archive.read(f"{name}.dist-info/METADATA").decode()
        assert f"{name}.dist-info/licenses/LICENSE" in archive.namelist()
        assert "lemo-fx = lemo_fx.cli.app:app" in archive.read(f"{name}.dist-info/entry_points.txt").decode()
    assert f"\nVersion: {lemo_fx.__version__}\n" in metadata
    assert "\nLicense-Expression: Apache-2.0\n" in metadata
    names = ("lemo_fx", "lemo_fx.passes.pipeline", "lemo_fx.kernels.eliminate.op")
    script = f"from importlib.util import find_spec; import lemo_fx.cli; [print(find_spec(n).origin) for n in {names}]"
    found = run(tmp_path, "-c", script, PYTHONPATH=str(installed)).splitlines()
    assert [Path(path).relative_to(installed).as_posix() for path in found] == [
        "lemo_fx/__init__.py",
        "lemo_fx/passes/pipeline.py",
        "lemo_fx/kernels/eliminate/op.py",
    ]
