"""The machine that a command runs on: its record, its load, its processes, and what it can compute."""

from __future__ import annotations

import datetime
import os
import platform
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import lemo_fx
from lemo_fx.errors import InputError


def environment(command: str) -> dict[str, Any]:
    """Where and how the figures were made."""
    return {
        "command": command,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "lemo_fx": lemo_fx.__version__,
        "cpu": _processor(),
        "threads": torch.get_num_threads(),
    }


def other_load() -> float:
    """Average number of busy processes on the machine during the last minute; 0 where that is not known."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line]
        if names:
            return names[0]
    return platform.processor() or platform.machine()


def is_first() -> bool:
    """Whether this process is the one that writes and speaks."""
    return int(os.environ.get("RANK", "0")) == 0


def processes() -> int:
    """How many a launcher such as torchrun has started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def check_alone() -> None:
    """Raise InputError where a launcher started several processes."""
    if processes() > 1:
        raise InputError("lemo-fx uses one device: for several, transform the model in a Trainer script")


def check_attention(attention: str | None) -> None:
    """Raise InputError where there is no such attention implementation, or torch lacks its backward on this machine."""
    known = ("eager", *ALL_ATTENTION_FUNCTIONS.valid_keys())
    if attention is not None and attention not in known and "/" not in attention:
        raise InputError(f"--attention {attention!r} is not one of eager, sdpa, flex_attention, flash_attention_2, ...")
    if attention == "flex_attention" and not torch.cuda.is_available():
        raise InputError("--attention flex_attention trains on a GPU only, and here is none: choose sdpa or eager")


def compiles(asked: bool | None) -> bool:
    """Whether decoder layers are compiled: as asked, else where there is a GPU."""
    return torch.cuda.is_available() if asked is None else asked
