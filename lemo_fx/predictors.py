"""What `lemo_fx.fit` learns about a base model, and its file format: one safetensors file and one json."""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from lemo_fx.config import LemoConfig, SiteKind
from lemo_fx.errors import PredictorError
from lemo_fx.parts import PredictedScore, StandIn
from lemo_fx.predictor_training import Recipe, random_weights
from lemo_fx.sites import causal_model, decoder_layers, site_names

FORMAT_VERSION = 2
TENSORS = "predictors.safetensors"
RECORD = "predictors.json"
DTYPES = ("F32", "BF16", "F16", "I8")
NAME = re.compile(r"layers\.\d+\.\w+\.(stand_in\.(down|up|bias)|predictor\.\w+)")
REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
HUB_ERRORS: tuple[type[BaseException], ...] = (OSError, ValueError, *HfHubHTTPError.__bases__)
"""What huggingface_hub raises: OSErrors, ValueErrors, and for a broken connection the error of its HTTP library, which
differs by version and is a base of its own."""
IDENTITY = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")


def hidden_size(model: nn.Module) -> int:
    """Width of a model's residual stream, where its tokens enter it."""
    return int(model.get_input_embeddings().weight.shape[1])  # type: ignore[operator]


def fingerprint(config: Any) -> str:
    """Hash of what makes a base model's activations its own: kind and sizes (names and paths may differ)."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    facts = {name: getattr(text, name, None) for name in IDENTITY}
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def identity(model: nn.Module, layers: int, block_size: int) -> dict[str, Any]:
    """The part of a record that says what the weights belong to."""
    head = causal_model(model)
    base: Any = model if head is None else head
    return {
        "format_version": FORMAT_VERSION,
        "model_class": type(base).__name__,
        "fingerprint": fingerprint(base.config),
        "hidden_size": hidden_size(model),
        "layers": layers,
        "block_size": block_size,
    }


_NETWORK = {"first", "first_bias", "second", "second_bias", "third"}
PARTS = ({*_NETWORK, "distance"}, {*_NETWORK, "offset"})
"""Names of an attention's and of an MLP's predictor weights."""


@dataclass(frozen=True)
class Predictors:
    """Fitted per-layer weights for one base model.

    Attributes:
        tensors: "layers.<index>.<site>.stand_in.<down|up|bias>" and "layers.<index>.<site>.predictor.<name>", the names
            of `lemo_fx.prediction`, -> tensor.
        record: plain facts: format version, base model's class and fingerprint, hidden size, number of layers, how the
            fit was made and how well it explains each branch.
    """

    tensors: Mapping[str, torch.Tensor]
    record: Mapping[str, Any] = field(default_factory=dict)

    def has_predictor(self, layer: int, site: str) -> bool:
        """Whether a pattern predictor was trained for this site."""
        return f"layers.{layer}.{site}.predictor.first" in self.tensors

    def predictor(self, layer: int, site: str) -> PredictedScore:
        """The pattern predictor of one site.

        Raises:
            PredictorError: none was trained.
        """
        prefix = f"layers.{layer}.{site}.predictor."
        weights = {n.removeprefix(prefix): t.clone() for n, t in sorted(self.tensors.items()) if n.startswith(prefix)}
        if set(weights) not in PARTS:
            raise PredictorError(
                f"no predictor was trained for layer {layer}, {site}: fit with a config in which this site is sparse "
                "and its score is 'auto' or 'predicted'"
            )
        return PredictedScore(weights, int(self.record["block_size"]))

    def thresholds(self, kind: SiteKind) -> tuple[float, ...]:
        """One threshold per decoder layer, for `Elimination(threshold=...)`; 0 in layers that were dense.

        They are of predicted scores of sequences as long as `record["tuning"]["length"]`.

        Raises:
            PredictorError: `fit` was not asked to set them.
        """
        return self._tuned(kind, "threshold", 0.0)

    def budgets(self, kind: SiteKind) -> tuple[float, ...]:
        """One kept share per decoder layer, for `Elimination(keep=...)`; 1 in layers that were dense.

        Raises:
            PredictorError: `fit` was not asked to set them.
        """
        return self._tuned(kind, "keep", 1.0)

    def _tuned(self, kind: SiteKind, name: str, otherwise: float) -> tuple[float, ...]:
        sites = self.record.get("tuning", {}).get("sites", {})
        found = {int(site.split(".")[1]): facts[name] for site, facts in sites.items() if site.endswith(f".{kind}")}
        if not found:
            raise PredictorError(f"no thresholds were set for {kind}: lemo_fx.fit(model, sequences, thresholds=True)")
        return tuple(found.get(layer, otherwise) for layer in range(int(self.record["layers"])))

    @property
    def predictor_bytes(self) -> dict[str, int]:
        """Bytes of the pattern predictors by site ("layers.<index>.<site>"); stand-ins are not counted."""
        sizes: dict[str, int] = {}
        for name, tensor in self.tensors.items():
            site, kind, _ = name.rsplit(".", 2)
            if kind == "predictor":
                sizes[site] = sizes.get(site, 0) + tensor.nbytes
        return sizes

    @classmethod
    def random(cls, model: nn.Module, config: LemoConfig | None = None, seed: int = 0) -> Predictors:
        """Predictors of the size that `fit` would make, with random weights, for measuring time and memory.

        Which blocks they keep means nothing: never judge accuracy by them.
        """
        config = LemoConfig() if config is None else config
        layers = decoder_layers(model)
        hidden = hidden_size(model)
        generator = torch.Generator().manual_seed(seed)
        tensors = {}
        for index, (_, layer) in enumerate(layers):
            if config.is_dense(index, len(layers)):
                continue
            for name, kind in site_names(layer):
                if config.site(kind) is not None:
                    weights = random_weights(kind, hidden, Recipe().width_of(kind, hidden), generator)
                    tensors.update({f"layers.{index}.{name}.predictor.{n}": w for n, w in weights.items()})
        record = {**identity(model, len(layers), config.block_size), "random": True}
        return cls(tensors, record)

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

    def push_to_hub(
        self, repo_id: str, *, private: bool | None = None, token: str | None = None, message: str = "Upload predictors"
    ) -> str:
        """Upload both files to a repository of the Hugging Face Hub, made if need be; returns the commit's URL.

        Raises:
            PredictorError: the hub refused, or cannot be reached.
        """
        api = HfApi(token=token)
        try:
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            with tempfile.TemporaryDirectory() as scratch:
                self.save(scratch)
                return str(api.upload_folder(repo_id=repo_id, folder_path=scratch, commit_message=message))
        except HUB_ERRORS as error:
            raise PredictorError(f"cannot push predictors to {repo_id}: {error}") from error

    @classmethod
    def load(
        cls,
        folder: str | Path,
        *,
        revision: str | None = None,
        token: str | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
    ) -> Predictors:
        """Read both files from a folder, or, if there is none of this name, from a repository "owner/name" of the hub.

        Args:
            revision, token, cache_dir, local_files_only: as for `huggingface_hub.snapshot_download`. With the last, or
                HF_HUB_OFFLINE=1, only the local cache is looked into.

        Raises:
            PredictorError: a file is missing, damaged, of another version, or does not hold what the json lists;
                found out from the header, before any tensor is read.
        """
        if not Path(folder).exists() and REPOSITORY.fullmatch(str(folder)):
            try:
                folder = snapshot_download(
                    str(folder),
                    revision=revision,
                    token=token,
                    cache_dir=cache_dir,
                    local_files_only=local_files_only,
                    allow_patterns=[TENSORS, RECORD],
                )
            except HUB_ERRORS as error:
                raise PredictorError(f"{folder} is neither a folder nor found on the hub: {error}") from error
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
                    part = file.get_slice(name)
                    shape = list(part.get_shape())
                    if shape != list(listed[name][1:]) or max(shape) > record["hidden_size"] or len(shape) > 3:
                        raise PredictorError(f"{folder / TENSORS}: {name} has shape {shape}, {RECORD} says otherwise")
                    if not NAME.fullmatch(name) or part.get_dtype() not in DTYPES:
                        raise PredictorError(f"{folder / TENSORS}: {name} of type {part.get_dtype()} has no use here")
                return cls({name: file.get_tensor(name) for name in names}, record)
        except (OSError, SafetensorError, ValueError) as error:
            if isinstance(error, PredictorError):
                raise
            raise PredictorError(f"{folder / TENSORS} is missing or damaged: {error}") from error
