"""What `lemo_fx.fit` learns about a base model, and its file format: one safetensors file and one json."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from lemo_fx.errors import PredictorError
from lemo_fx.parts import StandIn

FORMAT_VERSION = 1
TENSORS = "predictors.safetensors"
RECORD = "predictors.json"
IDENTITY = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")


def fingerprint(config: Any) -> str:
    """Hash of what makes a base model's activations its own: kind and sizes (names and paths may differ)."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    facts = {name: getattr(text, name, None) for name in IDENTITY}
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Predictors:
    """Fitted per-layer weights for one base model.

    Attributes:
        tensors: "layers.<index>.<site>.stand_in.<down|up|bias>" -> tensor.
        record: plain facts: format version, base model's class and fingerprint, hidden size, number of layers, how the
            fit was made and how well it explains each branch.
    """

    tensors: Mapping[str, torch.Tensor]
    record: Mapping[str, Any] = field(default_factory=dict)

    def stand_in(self, layer: int, site: str) -> StandIn:
        """The stand-in of one site.

        Raises:
            PredictorError: it was not fitted.
        """
        prefix = f"layers.{layer}.{site}.stand_in."
        try:
            parts = [self.tensors[prefix + name].clone() for name in ("down", "up", "bias")]
        except KeyError as error:
            raise PredictorError(
                f"no stand_in was fitted for layer {layer}, {site}: fit with a config in which this site is sparse"
            ) from error
        return StandIn(*parts)

    def check_fits(self, model: nn.Module) -> None:
        """Raise PredictorError unless these were fitted to a model of this class and size."""
        config = getattr(model, "config", None)
        if config is None or fingerprint(config) != self.record.get("fingerprint"):
            raise PredictorError(
                f"these predictors were fitted to a {self.record.get('model_class')} of other kind or size "
                f"(hidden {self.record.get('hidden_size')}, {self.record.get('layers')} layers): run lemo_fx.fit on "
                "this base model"
            )

    def save(self, folder: str | Path) -> None:
        """Write both files into `folder`; a crash or a full disk leaves earlier files as they were."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: value.detach().contiguous().cpu() for name, value in self.tensors.items()}
        shapes = {name: [str(value.dtype).removeprefix("torch."), *value.shape] for name, value in tensors.items()}
        with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as scratch:
            save_file(tensors, Path(scratch) / TENSORS)
            (Path(scratch) / RECORD).write_text(json.dumps({**self.record, "tensors": shapes}, indent=1))
            for name in (TENSORS, RECORD):
                os.replace(Path(scratch) / name, folder / name)

    @classmethod
    def load(cls, folder: str | Path) -> Predictors:
        """Read both files.

        Raises:
            PredictorError: a file is missing, damaged, of another version, or does not hold what the json lists;
                found out from the header, before any tensor is read.
        """
        folder = Path(folder)
        try:
            record = json.loads((folder / RECORD).read_text())
            listed = record.pop("tensors")
            version = record["format_version"]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise PredictorError(f"{folder / RECORD} is missing or damaged: {error!r}") from error
        if version != FORMAT_VERSION:
            raise PredictorError(f"{folder} has format version {version}; this lemo_fx reads {FORMAT_VERSION}")
        try:
            with safe_open(folder / TENSORS, framework="pt") as file:
                names = set(file.keys())
                if names != set(listed):
                    raise PredictorError(f"{folder / TENSORS} does not hold the tensors that {RECORD} lists")
                for name in names:
                    shape = file.get_slice(name).get_shape()
                    if list(shape) != list(listed[name][1:]) or max(shape) > record["hidden_size"]:
                        raise PredictorError(f"{folder / TENSORS}: {name} has shape {shape}, {RECORD} says otherwise")
                return cls({name: file.get_tensor(name) for name in names}, record)
        except (OSError, SafetensorError, ValueError) as error:
            if isinstance(error, PredictorError):
                raise
            raise PredictorError(f"{folder / TENSORS} is missing or damaged: {error}") from error
