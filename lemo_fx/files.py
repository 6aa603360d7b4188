"""Writing files where a process may be killed, a disk may be full and power may fail."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from lemo_fx.errors import InputError, StorageError

WRONG_PLACE = {errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENOENT, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG}
"""What no free space mends."""


def check_folder(path: Path) -> None:
    """Raise InputError where `path` is no folder that can be written in, or made; leaves nothing behind."""
    nearest = path
    while not os.path.lexists(nearest) and nearest != nearest.parent:
        nearest = nearest.parent
    if not os.path.isdir(nearest):
        raise InputError(f"cannot write in {path}: {nearest} is not a folder; give another one")
    try:
        with contextlib.suppress(FileNotFoundError):
            # Says what the names alone do not, such as that one is too long.
            path.stat()
        # Shows more than the permissions: root has them where nobody can write. The file has no name on Linux.
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        raise InputError(f"cannot write in {path}: {error.strerror or error}; give another folder") from error


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what a full or read-only disk raises into a StorageError that names the file."""
    try:
        yield
    except StorageError:
        raise
    except (OSError, SafetensorError) as error:
        elsewhere = getattr(error, "errno", None) in WRONG_PLACE
        mend = (
            "give another folder" if elsewhere else "free some space, or give a folder on another disk, and try again"
        )
        raise StorageError(f"cannot write {path}: {error}; {mend}") from error


def write_text(path: Path, text: str) -> None:
    """Write a text file in one piece.

    Raises:
        StorageError: it cannot be written; what was at `path` is as it was.
    """
    scratch = path.with_name(path.name + ".tmp")
    try:
        with writing(path):
            scratch.write_text(text)
            _settle(scratch)
            os.replace(scratch, path)
            if hasattr(os, "O_DIRECTORY"):  # Windows opens no folders
                _settle(path.parent)
    finally:
        scratch.unlink(missing_ok=True)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a record that people can read, as `write_text`."""
    write_text(path, json.dumps(content, indent=1) + "\n")


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write a safetensors file, whole only once this has returned, or raise StorageError."""
    with writing(path):
        save_file(dict(tensors), path)
        _settle(path)


def _settle(path: Path) -> None:
    """Wait until a file's bytes, or a folder's names, are on the disk and not only in the system's cache."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
