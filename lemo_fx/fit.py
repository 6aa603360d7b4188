"""Offline fitting on the frozen base model: a profiling pass over sequences, then a solution per site.

Stand-ins are solved in closed form from second moments; pattern predictors are trained on pooled blocks and true scores
that the profiling pass leaves in a folder, one site at a time.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import Progress
from safetensors.torch import load_file, save_file
from torch import nn

from lemo_fx import install as installing
from lemo_fx import parallel, prediction
from lemo_fx.capture import ABSENT_IN_TRAINING, capture
from lemo_fx.config import LemoConfig, SiteKind
from lemo_fx.errors import ConfigError, InputError, PredictorError, UnsupportedModelError
from lemo_fx.parts import ActivationScore, AttentionScore
from lemo_fx.passes.checker import check
from lemo_fx.passes.insert_probes import insert_probes
from lemo_fx.passes.insert_scores import insert_scores
from lemo_fx.passes.rewrite import LayerRewrite, PlannedSite
from lemo_fx.predictor_training import Blocks, Recipe, recall, train
from lemo_fx.predictors import Predictors, identity, predictor_width
from lemo_fx.runtime import Step
from lemo_fx.sites import decoder_layers, find_sites, site_name
from lemo_fx.transform import suspended


class BranchStatistics(nn.Module):
    """A probe: sums up second moments of a branch's input and output, and writes scored blocks to a file.

    Memory is that of two [H, H] matrices, whatever the length of the sequences. Per block of tokens the files get the
    representative embedding in half precision and the true score.

    Args:
        path: of the files, without their endings; written to where the probe is given scores.
    """

    def __init__(self, hidden: int, device: torch.device, path: Path, block_size: int) -> None:
        super().__init__()
        self.path = path
        self.block_size = block_size
        self.count = 0
        self.sums = [torch.zeros(hidden, dtype=torch.float64, device=device) for _ in range(2)]
        self.products = [torch.zeros(hidden, hidden, dtype=torch.float32, device=device) for _ in range(2)]
        self.square = torch.zeros((), dtype=torch.float64, device=device)

    def forward(
        self,
        source: torch.Tensor,
        output: torch.Tensor,
        stream: torch.Tensor | None = None,
        scores: torch.Tensor | None = None,
    ) -> None:
        """Note one forward pass: source [B, S, H] the branch's normed input, output [B, S, H] what it adds.

        Args:
            stream: [1, S, H] the residual stream that the branch reads; scores: [1, n] true informativeness.
        """
        if stream is not None and scores is not None:
            blocks = prediction.represent(stream, None, self.block_size)[0].half().cpu()
            _append(self.path.with_name(self.path.name + ".blocks"), blocks)
            _append(self.path.with_name(self.path.name + ".scores"), scores[0].float().cpu())
        x, y = source.detach().flatten(0, -2).float(), output.detach().flatten(0, -2).float()
        self.count += x.shape[0]
        self.sums[0] += x.sum(0)
        self.sums[1] += y.sum(0)
        self.products[0].addmm_(x.T, x)
        self.products[1].addmm_(x.T, y)
        self.square += y.square().sum()

    def solve(self, rank: int, ridge: float) -> tuple[dict[str, torch.Tensor], float]:
        """Reduced-rank ridge regression of output on source.

        Args:
            rank: of the map.
            ridge: added to the diagonal, as a share of its mean.

        Returns:
            ({"down" [H, r], "up" [r, H], "bias" [H]}, share of the output's variance that it explains).
        """
        mean_x, mean_y = (s / self.count for s in self.sums)
        xx = self.products[0].double() / self.count - torch.outer(mean_x, mean_x)
        xy = self.products[1].double() / self.count - torch.outer(mean_x, mean_y)
        hidden = xx.shape[0]
        xx_ridged = xx + ridge * xx.diagonal().mean() * torch.eye(hidden, dtype=xx.dtype, device=xx.device)
        full = torch.linalg.solve(xx_ridged, xy)
        # The best map of a given rank projects the fitted values on their leading directions.
        directions = torch.linalg.eigh(full.T @ xx @ full).eigenvectors[:, -min(rank, hidden) :]
        down, up = full @ directions, directions.T
        low = down @ up
        variance = self.square / self.count - mean_y.square().sum()
        missed = variance - 2 * (low * xy).sum() + (low * (xx @ low)).sum()
        explained = 1 - float(missed / variance.clamp_min(1e-30))
        parts = {"down": down, "up": up, "bias": mean_y - mean_x @ low}
        return {name: value.float().contiguous().cpu() for name, value in parts.items()}, explained


def _append(path: Path, values: torch.Tensor) -> None:
    with path.open("ab") as file:
        values.contiguous().numpy().tofile(file)


def fit(
    model: nn.Module,
    sequences: Any,
    config: LemoConfig | None = None,
    *,
    rank: int | None = None,
    ridge: float = 1e-3,
    recipe: Recipe | None = None,
    folder: str | Path | None = None,
    progress: bool = True,
) -> Predictors:
    """Learn from one pass of the frozen base model over sequences what `transform` can use. Weights are never changed.

    For every site that `config` makes sparse: a `stand_in` map, by reduced-rank ridge regression of the branch's
    output on its normed input; and, where its score is "auto" or "predicted", a pattern predictor trained on the true
    block scores, causal and with position embedding. The last tenth of the sequences (none if there are under ten) is
    kept from training, and the predictors' recall is measured on it.

    Args:
        model: causal language model, with or without adapters; moved nowhere, its training mode restored.
        sequences: token ids: a list of lists, a [N, S] tensor, or rows with "input_ids" (a datasets Dataset).
        config: which sites are sparse; `LemoConfig()` if None.
        rank: of the stand-in maps; an eighth of the hidden size if None.
        ridge: regularisation of the maps, as a share of the mean variance of the input.
        recipe: how predictors are trained; `Recipe(width=predictor_width(hidden))` if None.
        folder: keep intermediate results here, about 2 H bytes per block and site: a killed run that is started again
            with the same arguments goes on after its last finished layer. The result is saved here too.
        progress: show a progress bar.

    Raises:
        InputError: no sequence, or not token ids.
        UnsupportedModelError: as for `transform`; or the model is already wrapped by DDP or FSDP.
        ConfigError: a rank other than 0 was given a folder.
    """
    config = LemoConfig() if config is None else config
    parallel.refuse_wrapped(model)
    parallel.refuse_collective(model, "lemo_fx.fit")
    parallel.refuse_process(model)
    parallel.refuse_cut_weights(model)
    if folder is not None and torch.distributed.is_initialized() and torch.distributed.get_rank() > 0:
        raise ConfigError(
            f"folder={str(folder)!r} on rank {torch.distributed.get_rank()}: several ranks must not write one folder; "
            "call lemo_fx.fit on rank 0, then torch.distributed.barrier(), then Predictors.load(folder) on all ranks"
        )
    layers = decoder_layers(model)
    if not layers:
        raise UnsupportedModelError(f"{type(model).__name__} has no causal decoder layers to fit to")
    if rank is not None and rank < 1:
        raise ConfigError(f"rank={rank} must be at least 1")
    hidden = _hidden_size(model)
    recipe = Recipe(width=predictor_width(hidden)) if recipe is None else recipe
    batches = list(_batches(sequences))
    if not batches:
        raise InputError("fit needs at least one sequence of token ids")
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    with contextlib.ExitStack() as stack, Progress(disable=not progress, transient=True) as bar:
        scratch = Path(folder) if folder else Path(stack.enter_context(tempfile.TemporaryDirectory()))
        work = scratch / "unfinished"
        key = _key(model, batches, config, rank, ridge)
        profile = Profile.read(work, key)
        if profile is None:
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir(parents=True)
            probes = _profile(model, batches, layers, config, work, bar)
            profile = _solve(probes, work, key, rank or max(1, hidden // 8), ridge)
        tensors = dict(load_file(work / "stand_ins.safetensors"))
        training: dict[str, Any] = {}
        names = [site for site, kind in profile.kinds.items() if kind]
        for site in bar.track(names, description="training predictors"):
            weights, facts = _trained(work, site, profile, hidden, recipe)
            tensors.update({f"{site}.predictor.{name}": value for name, value in weights.items()})
            training[site] = facts
        record = {
            **identity(base, hidden, len(layers), config.block_size),
            "tokens": sum(ids.numel() for ids in batches),
            "ridge": ridge,
            "explained_variance": profile.explained,
            "recipe": vars(recipe),
            "training": training,
            "date": datetime.date.today().isoformat(),
        }
        predictors = Predictors(tensors, record)
        if folder:
            predictors.save(folder)
            shutil.rmtree(work)
    return predictors


@dataclass
class Profile:
    """What a finished profiling pass left in its folder.

    Attributes:
        key: of the arguments it was made from.
        lengths: blocks per sequence.
        kinds: by site ("layers.<index>.<site>"): its kind where a predictor is to be trained, else None.
        explained: share of each branch's variance that its stand-in explains.
    """

    key: str
    lengths: list[int]
    kinds: dict[str, SiteKind | None]
    explained: dict[str, float] = field(default_factory=dict)

    @classmethod
    def read(cls, work: Path, key: str) -> Profile | None:
        """The profile in this folder; None where there is none, or it was made from other arguments."""
        try:
            found = cls(**json.loads((work / "profile.json").read_text()))
        except (OSError, ValueError, TypeError):
            return None
        return found if found.key == key else None

    def blocks(self, work: Path, site: str, hidden: int) -> Blocks:
        """A site's scored blocks."""
        embeddings = torch.from_numpy(np.fromfile(work / f"{site}.blocks", np.float16)).view(-1, hidden)
        scores = torch.from_numpy(np.fromfile(work / f"{site}.scores", np.float32))
        longest = max(self.lengths)
        real = torch.arange(longest) < torch.tensor(self.lengths)[:, None]
        padded = Blocks(
            torch.zeros(len(self.lengths), longest, hidden, dtype=torch.float16), torch.zeros(real.shape), real
        )
        padded.representations[real], padded.scores[real] = embeddings, scores
        return padded


def _key(model: nn.Module, batches: list[torch.Tensor], config: LemoConfig, *settings: Any) -> str:
    """Hash of what a profile depends on: sequences, settings, and a sample of every weight."""
    digest = hashlib.sha256(repr((config, settings)).encode())
    for ids in batches:
        digest.update(ids.cpu().numpy().tobytes())
    for parameter in model.parameters():
        digest.update(parameter.detach().flatten()[:64].float().cpu().numpy().tobytes())
    return digest.hexdigest()


def _write_text(path: Path, text: str) -> None:
    """Write a file that is either whole or absent."""
    scratch = path.with_name(path.name + ".tmp")
    scratch.write_text(text)
    os.replace(scratch, path)


def _profile(
    model: nn.Module,
    batches: list[torch.Tensor],
    layers: list[tuple[str, nn.Module]],
    config: LemoConfig,
    work: Path,
    bar: Progress,
) -> dict[str, tuple[BranchStatistics, SiteKind | None, list[int]]]:
    device = next(model.parameters()).device
    was_training = [(module, module.training) for module in model.modules()]
    with suspended(model):
        plans, probes = _probe_plans(model, layers, config, device, work)
        installing.install(plans)
        try:
            model.eval()
            with torch.no_grad():
                for ids in bar.track(batches, description="profiling the base model"):
                    model(input_ids=ids.to(device), use_cache=False, logits_to_keep=1)
        finally:
            for plan in plans:
                installing.uninstall(plan.module)
            for module, training in was_training:
                module.training = training
    lengths = [math.ceil(ids.shape[1] / config.block_size) for ids in batches]
    return {site: (probe, kind, lengths) for site, (probe, kind) in probes.items()}


def _solve(
    probes: dict[str, tuple[BranchStatistics, SiteKind | None, list[int]]],
    work: Path,
    key: str,
    rank: int,
    ridge: float,
) -> Profile:
    """Solve the stand-ins and mark the profile as finished."""
    tensors: dict[str, torch.Tensor] = {}
    profile = Profile(key, [], {})
    for site, (probe, kind, lengths) in probes.items():
        if probe.count == 0:
            raise PredictorError(f"{site} saw no token: did the model run another path than its decoder layers?")
        parts, share = probe.solve(rank, ridge)
        tensors.update({f"{site}.stand_in.{name}": value for name, value in parts.items()})
        profile.explained[site] = round(share, 4)
        profile.kinds[site] = kind
        profile.lengths = lengths
    save_file(tensors, work / "stand_ins.safetensors")
    _write_text(work / "profile.json", json.dumps(vars(profile)))
    return profile


def _trained(
    work: Path, site: str, profile: Profile, hidden: int, recipe: Recipe
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """A site's predictor: read back where an earlier run finished it, else trained and written."""
    kind = profile.kinds[site]
    assert kind is not None
    weights_file, record_file = work / f"{site}.safetensors", work / f"{site}.json"
    if record_file.exists():
        found = json.loads(record_file.read_text())
        if found["recipe"] == vars(recipe):
            return load_file(weights_file), found["facts"]
    blocks = profile.blocks(work, site, hidden)
    count = len(blocks) // 10
    heldout = blocks[len(blocks) - count :] if count else None
    trained = train(kind, blocks[: len(blocks) - count], recipe, heldout)
    facts = trained.record
    if heldout is not None:
        predicted = prediction.scores(trained.weights, heldout.representations.float(), heldout.real)
        facts["recall"] = round(recall(predicted, heldout.scores, heldout.real, 0.4), 4)
    save_file(trained.weights, weights_file)
    _write_text(record_file, json.dumps({"recipe": vars(recipe), "facts": facts}))
    return trained.weights, facts


def _hidden_size(model: nn.Module) -> int:
    embeddings = model.get_input_embeddings()  # type: ignore[operator]
    return int(embeddings.weight.shape[1])


def _batches(sequences: Any) -> Iterator[torch.Tensor]:
    """Each sequence as a [1, S] tensor: no padding, whatever the lengths."""
    rows: Iterable[Any] = sequences
    for row in rows:
        ids = row["input_ids"] if isinstance(row, dict) or hasattr(row, "keys") else row
        tensor = torch.as_tensor(ids if isinstance(ids, Sequence | torch.Tensor) else list(ids))
        if tensor.dim() != 1 or tensor.is_floating_point() or tensor.numel() == 0:
            raise InputError("sequences must be token ids: a list of lists, a [N, S] tensor, or rows with 'input_ids'")
        yield tensor.long()[None]


def _probe_plans(
    model: nn.Module, layers: list[tuple[str, nn.Module]], config: LemoConfig, device: torch.device, work: Path
) -> tuple[list[installing.Plan], dict[str, tuple[BranchStatistics, SiteKind | None]]]:
    plans, probes = [], {}
    observing = LemoConfig(block_size=1, active="always")
    for index, (name, layer) in enumerate(layers):
        if config.is_dense(index, len(layers)):
            continue
        graph = capture(layer, ABSENT_IN_TRAINING)
        sites, _ = find_sites(graph)
        planned = [PlannedSite(site_name(s, sites), s, None) for s in sites if config.site(s.kind) is not None]
        rewrite = LayerRewrite(layer, graph, planned)
        for site in planned:
            kind = site.site.kind
            elimination = config.site(kind)
            scored = elimination is not None and elimination.score in ("auto", "predicted")
            key = f"layers.{index}.{site.name}"
            probe = BranchStatistics(_hidden_size(model), device, work / key, config.block_size)
            probes[key] = (probe, kind if scored else None)
            rewrite.modules[f"lemo_{site.name}_probe"] = probe
            if scored:
                mixer = layer.get_submodule(str(site.site.mixer.target))
                score = AttentionScore if kind == "attention" else ActivationScore
                rewrite.modules[f"lemo_{site.name}_score"] = score(mixer, config.block_size)
                site.treatment, site.score = "skip", "measured"
        insert_scores(rewrite)
        insert_probes(rewrite)
        check(rewrite, "insert_probes", finished=True)
        plans.append(installing.layer_plan(name, rewrite, observing, Step(), []))
    return plans, probes
