"""What `lemo_fx.fit` learns about a base model, and its file format: one safetensors file and one json."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
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

from lemo_fx.config import LemoConfig, SiteKind, as_config, check_seed
from lemo_fx.errors import PredictorError, UnsupportedModelError
from lemo_fx.files import write_json, writing
from lemo_fx.graph.anatomy import causal_model, decoder_layers, require_model, text_config
from lemo_fx.graph.sites import site_names
from lemo_fx.runtime.network import DECAYS, default_width, random_weights
from lemo_fx.runtime.scores import Candidates, PredictedScore
from lemo_fx.runtime.stand_in import StandIn

FORMAT_VERSION = 2
TENSORS = "predictors.safetensors"
RECORD = "predictors.json"
LARGEST_RECORD = 1 << 26
"""Bytes of a json."""
LARGEST = 1 << 20
"""Hidden size, layers or tokens in a block that a record may claim."""
DTYPES = ("F32", "BF16", "F16", "I8")
NAME = re.compile(r"layers\.\d+\.\w+\.(stand_in\.(down|up|bias)|predictor\.\w+)")
REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
HUB_ERRORS: tuple[type[BaseException], ...] = (OSError, ValueError, *HfHubHTTPError.__bases__)
"""What huggingface_hub raises: OSErrors, ValueErrors, and for a broken connection the error of its HTTP library, which
differs by version and is a base of its own."""
IDENTITY = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")


def hidden_size(model: nn.Module) -> int:
    """Width of a model's residual stream; its embeddings may be narrower (OPT-350M projects them)."""
    return int(text_config(model.config).hidden_size)


def fingerprint(config: Any) -> str:
    """Hash of what makes a base model's activations its own: kind and sizes (names and paths may differ)."""
    text = text_config(config)
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
            of `lemo_fx.runtime.network`, -> tensor.
        record: plain facts: format version, base model's class and fingerprint, hidden size, number of layers, how the
            fit was made and how well it explains each branch.
    """

    tensors: Mapping[str, torch.Tensor]
    record: Mapping[str, Any] = field(default_factory=dict)

    def has_predictor(self, layer: int, site: str) -> bool:
        """Whether a pattern predictor was trained for this site."""
        return f"layers.{layer}.{site}.predictor.first" in self.tensors

    def predictor(self, layer: int, site: str) -> PredictedScore | Candidates:
        """The pattern predictor of one site: an attention's, or an MLP's.

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
        part = PredictedScore if "distance" in weights else Candidates
        return part(weights, int(self.record["block_size"]))

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
    def random(cls, model: nn.Module, config: LemoConfig | str | None = None, seed: int = 0) -> Predictors:
        """Predictors of the size that `fit` would make, with random weights, for measuring time and memory.

        Which blocks they keep means nothing: never judge accuracy by them.
        """
        config = as_config(config)
        check_seed(seed)
        require_model(model, "Predictors.random")
        layers = decoder_layers(model)
        if not layers:
            raise UnsupportedModelError(f"{type(model).__name__} has no causal decoder layers to choose in")
        hidden = hidden_size(model)
        generator = torch.Generator().manual_seed(seed)
        tensors = {}
        for index, (_, layer) in enumerate(layers):
            if config.is_dense(index, len(layers)):
                continue
            for name, kind in site_names(layer):
                if config.site(kind) is not None:
                    weights = random_weights(kind, hidden, default_width(kind, hidden), generator)
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
        """Write both files into `folder`. A kill at any moment leaves what was there or what is new, never a mix.

        The json names the digest of its tensors and is replaced in one step; the new tensors lie beside the old ones,
        named by their digest, until that is done.

        Raises:
            PredictorError: `folder` is none.
            StorageError: the disk is full, or the folder must not be written to; earlier files are as they were.
        """
        if not isinstance(folder, str | os.PathLike):
            raise PredictorError(f"save takes a folder, not {type(folder).__name__}")
        folder = Path(folder)
        tensors = {name: value.detach().contiguous().cpu() for name, value in self.tensors.items()}
        shapes = {name: [str(value.dtype).removeprefix("torch."), *value.shape] for name, value in tensors.items()}
        scratch = folder / ".saving"
        shutil.rmtree(scratch, ignore_errors=True)
        try:
            with writing(folder / TENSORS):
                scratch.mkdir(parents=True)
                save_file(tensors, scratch / TENSORS)
                digest = _digest(scratch / TENSORS)
                beside = _beside(folder, digest)
                known = beside.exists()
                os.replace(scratch / TENSORS, beside)
            try:
                write_json(folder / RECORD, {**self.record, "sha256": digest, "tensors": shapes})
            except BaseException:
                if not known:
                    beside.unlink()
                raise
            with writing(folder / TENSORS):
                os.replace(beside, folder / TENSORS)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        for left in folder.glob(_beside(folder, "*").name):
            left.unlink()

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

        The other arguments are `huggingface_hub.snapshot_download`'s. With `local_files_only`, or HF_HUB_OFFLINE=1,
        only the local cache is looked into.

        Raises:
            PredictorError: a file is missing, damaged, of another version, or does not hold what the json lists, or
                the weights do not fit together; sizes are found out from the header, before any tensor is read.
        """
        if not isinstance(folder, str | os.PathLike):
            raise PredictorError(f"load takes a folder or a repository of the hub, not {type(folder).__name__}")
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
        if not folder.is_dir():
            raise PredictorError(
                f"there is no folder {folder} of predictors: lemo-fx fit, or Predictors.save, makes one"
            )
        if (folder / RECORD).is_file() and (folder / RECORD).stat().st_size > LARGEST_RECORD:
            raise PredictorError(
                f"{folder / RECORD} is larger than {LARGEST_RECORD} bytes; fit or save the predictors again"
            )
        try:
            record = json.loads((folder / RECORD).read_text())
            version, listed, digest = record["format_version"], record.pop("tensors"), record.pop("sha256", None)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            state = "damaged" if (folder / RECORD).exists() else "missing"
            raise PredictorError(f"{folder / RECORD} is {state}; fit or save the predictors again") from error
        if version != FORMAT_VERSION:
            raise PredictorError(f"{folder} has format version {version}; this lemo_fx reads {FORMAT_VERSION}")
        _check_record(folder / RECORD, record, listed, digest)
        path = folder / TENSORS
        if digest is not None and _beside(folder, digest).exists():
            path = _beside(folder, digest)
        try:
            with safe_open(path, framework="pt") as file:
                names = set(file.keys())
                if names != set(listed):
                    raise PredictorError(f"{path} does not hold the tensors that {RECORD} lists")
                shapes = {}
                for name in sorted(names):
                    part = file.get_slice(name)
                    shapes[name] = tuple(part.get_shape())
                    if [*shapes[name]] != listed[name][1:]:
                        raise PredictorError(f"{path}: {name} has shape {shapes[name]}, {RECORD} says otherwise")
                    if not NAME.fullmatch(name) or part.get_dtype() not in DTYPES:
                        raise PredictorError(f"{path}: {name} of type {part.get_dtype()} has no use here")
                _check_shapes(path, record, shapes)
                if digest is not None and _digest(path) != digest:
                    raise PredictorError(f"{path} is damaged, or not the one that {RECORD} was saved with")
                return cls({name: file.get_tensor(name) for name in shapes}, record)
        except (OSError, SafetensorError, ValueError, RuntimeError) as error:
            if isinstance(error, PredictorError):
                raise
            state = "damaged" if path.exists() else "missing"
            raise PredictorError(f"{path} is {state}; fit or save the predictors again") from error


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _beside(folder: Path, digest: str) -> Path:
    """Where the tensors of this digest wait for a json that names them."""
    return folder / f"predictors.{digest}.safetensors"


def _check_record(path: Path, record: Any, listed: Any, digest: Any) -> None:
    """Raise PredictorError unless what `load` and `transform` read of a record is of the right kind and size."""
    kinds = {"model_class": str, "fingerprint": str, "hidden_size": int, "layers": int, "block_size": int}
    for name, kind in kinds.items():
        value = record.get(name)
        if type(value) is not kind or (isinstance(value, int) and not 0 < value <= LARGEST):
            raise PredictorError(f"{path} is damaged: {name} is {str(value)[:80]!r}")
    if not isinstance(listed, dict) or not all(isinstance(facts, list) for facts in listed.values()):
        raise PredictorError(f"{path} is damaged: it does not list tensors")
    if digest is not None and not (isinstance(digest, str) and re.fullmatch("[0-9a-f]{64}", digest)):
        raise PredictorError(f"{path} is damaged: sha256 is no digest")


_SITE = {
    "stand_in": {"down": "Hr", "up": "rH", "bias": "H"},
    "predictor": {
        "first": "THw",
        "first_bias": "Tw",
        "second": "Twv",
        "second_bias": "Tv",
        "third": "Tvd",
        "distance": "n",
        "offset": "1",
    },
}
"""Axes of each weight. Those of one letter must be equal within a part of a site; all are at most the hidden size."""


def _check_shapes(path: Path, record: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise PredictorError unless the tensors of every site belong together and to the record's model."""
    hidden = record["hidden_size"]
    sizes: dict[str, dict[str, int]] = {}
    for name, shape in shapes.items():
        site, kind, weight = name.rsplit(".", 2)
        axes = _SITE[kind].get(weight, "")
        networks = {"T": 2} if f"{site}.{kind}.distance" in shapes else {"T": 1, "d": 1}
        known = sizes.setdefault(f"{site}.{kind}", {"H": hidden, "n": len(DECAYS), "1": 1, **networks})
        fits = len(axes) == len(shape) and all(
            known.setdefault(axis, size) == size and 0 < size <= max(hidden, len(DECAYS))
            for axis, size in zip(axes, shape, strict=True)
        )
        if not fits or int(name.split(".")[1]) >= record["layers"]:
            raise PredictorError(
                f"{path}: {name} has shape {list(shape)}, which does not fit a model of hidden size {hidden} and "
                f"{record['layers']} layers"
            )
