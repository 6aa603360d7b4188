"""The public verbs: `transform`, `revert`, `graphs`, `report`, `set_dense`, `labels`, `shard_sequence`."""

from __future__ import annotations

import dataclasses
import numbers
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import fx, nn

from lemo_fx.config import LemoConfig, as_config
from lemo_fx.errors import ConfigError, InputError, NotTransformedError, PredictorError
from lemo_fx.graph.anatomy import anatomy_of, causal_model, require_model
from lemo_fx.graph.capture import graph_module, restored
from lemo_fx.install import TRANSFORMATION, install, installed, mixers_of, plans_of, uninstall
from lemo_fx.passes.pipeline import PASSES, Pass, check_passes
from lemo_fx.passes.rewrite import part_name
from lemo_fx.planning.model import make_plans
from lemo_fx.planning.plans import Plan
from lemo_fx.recall import measure_recall
from lemo_fx.reporting import Report, SiteReport, base_in_float8, in_float8, lowerings
from lemo_fx.runtime.head import UNLABELLED
from lemo_fx.runtime.hooks import hooks_note, own_hooks
from lemo_fx.runtime.layer import pass_by
from lemo_fx.runtime.parts import SequenceGroup, check_alike, shard
from lemo_fx.runtime.select import SelectBlocks

if TYPE_CHECKING:
    from lemo_fx.predictors import Predictors

Model = TypeVar("Model", bound=nn.Module)


@dataclasses.dataclass
class Transformation:
    """What `transform` did to a model: kept on the model's outermost object."""

    config: LemoConfig
    predictors: Predictors | None
    passes: tuple[Pass, ...]
    notes: list[str]
    group: SequenceGroup | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Transformation:
        return dataclasses.replace(self)

    def __reduce__(self) -> tuple:
        # None: layers are pickled as they are without a transform.
        return type(None), ()


def transform(
    model: Model,
    config: LemoConfig | str | None = None,
    *,
    predictors: Predictors | None = None,
    dump: str | Path | None = None,
    passes: Sequence[Pass] = PASSES,
    sequence_group: dist.ProcessGroup | None = None,
) -> Model:
    """Rewrite a causal language model in place so that each layer works on its informative token blocks only.

    The model stays the same object of the same class with the same state_dict. In `eval()`, in `generate()` and with a
    cache that a call brings or asks for it runs its original code (see `LemoConfig.active`). Call it before or after
    adding PEFT adapters, and before DDP or FSDP2's `fully_shard` or after them; after `fully_shard` every rank must
    call it, since planning gathers one layer's weights at a time. Calling it again re-plans; with an equal plan it does
    nothing. Every error leaves the model as it was.

    Threads: several may transform, run and revert models at a time, each its own. One model in two threads is not safe:
    a step leaves its labels and choices on the model for its own layers and for the recompute in its backward. Dropout
    under activation checkpointing is not reproducible in threads, since they share torch's one generator.

    Args:
        model: a transformers causal language model, with or without PEFT adapters.
        config: what to eliminate, or the name of a preset ("careful", "balanced", "fast"); `LemoConfig()` if None.
        predictors: from `lemo_fx.fit`; where a score is "auto", they choose (see `Elimination`).
        dump: folder for the graph of every layer before the first and after each pass, as readable code.
        passes: what rewrites each layer's graph, in this order: `lemo_fx.passes.pipeline.PASSES`, and passes of your
            own between them (see "Writing a pass"). They must not change what a layer computes.
        sequence_group: ranks that share each sequence: in training, call the model with the same batch on each of them.

    Returns:
        The same model.

    Raises:
        ConfigError: the plan does not fit the model.
        UnsupportedModelError: no branch of any decoder layer can be rewritten, naming module and node; or the model
            runs under tensor, context or sequence parallelism, or in wrappers that hide its layers.
        PredictorError: `stand_in` or `predicted` without what they need.
        StorageError: `dump` cannot be written to.
    """
    config = as_config(config)
    require_model(model, "transform")
    if predictors is not None and (isinstance(predictors, type) or not hasattr(predictors, "check_fits")):
        raise PredictorError(
            f"predictors must be what lemo_fx.fit returns, not {type(predictors).__name__}; a folder is loaded by "
            "lemo_fx.Predictors.load(folder)"
        )
    if dump is not None and not isinstance(dump, str | os.PathLike):
        raise ConfigError(f"dump={dump!r} must be a folder")
    check_passes(passes)
    passes = tuple(passes)
    group = None if sequence_group is None else SequenceGroup.of(sequence_group)
    if group is not None and config.sequence_parts == 1:
        config = dataclasses.replace(config, sequence_parts=group.size)
    before = _find(model)
    same = before is not None and (before.config, before.passes, before.group) == (config, passes, group)
    if before is not None and same and before.predictors is predictors and dump is None:
        return model
    plans_before, mixers_before = plans_of(model), mixers_of(model)
    if before is not None:
        revert(model)
    try:
        anatomy = anatomy_of(model)
        plans, notes, mixers = make_plans(anatomy, config, predictors, Path(dump) if dump else None, passes, group)
        install(plans, _holder(model), anatomy.holders, mixers)
    except BaseException:
        _put_back(model, before, plans_before, mixers_before)
        raise
    vars(_holder(model))[TRANSFORMATION] = Transformation(config, predictors, passes, notes, group)
    return model


def revert(model: Model) -> Model:
    """Undo `transform` exactly; a model that was not transformed is returned as it is.

    Weights that were held in float8 (`LemoConfig(base="float8")`) come back in their dtype, but rounded.
    """
    require_model(model, "revert")
    for module in model.modules():
        uninstall(module)
    vars(_holder(model)).pop(TRANSFORMATION, None)
    return model


class Graphs(dict[str, fx.GraphModule]):
    """Graphs by module name; a name within the base model finds the module under the wrappers around it (PEFT's)."""

    def _whole(self, name: object) -> str | None:
        """The module's whole name; None where no module or several are meant."""
        if super().__contains__(name):
            return str(name)
        found = [whole for whole in self if isinstance(name, str) and name and whole.endswith(f".{name}")]
        return found[0] if len(found) == 1 else None

    def __missing__(self, name: str) -> fx.GraphModule:
        whole = self._whole(name)
        if whole is None:
            raise KeyError(f"no module named {name!r} was rewritten, or several; those that were: {', '.join(self)}")
        return self[whole]

    def __contains__(self, name: object) -> bool:
        return self._whole(name) is not None

    def get(self, name: str, default: Any = None) -> Any:
        """The graph of this name, or a default."""
        whole = self._whole(name)
        return default if whole is None else self[whole]


def graphs(model: nn.Module) -> dict[str, fx.GraphModule]:
    """The rewritten graphs by module name: the sparse decoder layers, and the causal model for its loss head.

    `graphs(model)["model.layers.2"]` finds a layer under PEFT's wrappers too. `print_readable()` shows one with the
    functions it calls.

    Raises:
        NotTransformedError: the model was not transformed.
    """
    _transformation(model)
    found = Graphs()
    for name, module, record in installed(model):
        # A causal model whose loss was not segmented still tells its layers the labels, but has no graph of its own.
        if next(iter(record.graph.nodes)).op == "placeholder":
            found[name] = graph_module(module, record.graph, record.functions)
    return found


def report(model: nn.Module, *, recall_on: Mapping[str, Any] | None = None) -> Report:
    """What was rewritten, layer by layer, and what the last step kept.

    Args:
        recall_on: a batch (keyword arguments of the model) on which to measure, too, how many of the blocks that the
            true scores would keep the predictors keep, see `lemo_fx.recall`. Costs a forward.

    Raises:
        NotTransformedError: the model was not transformed.
        InputError: `recall_on` is no batch.
    """
    done = _transformation(model)
    if recall_on is not None:
        _check_batch(model, recall_on)
    layers = {name: module for name, module, _ in installed(model)}
    recalls = {} if recall_on is None else measure_recall(model, layers, recall_on)
    rows = []
    for name, module, installation in installed(model):
        hook = next(own_hooks(module), None) if installation.rows else None
        hooked = "" if hook is None else hooks_note(*hook)
        for row in installation.rows:
            select = module._modules.get(part_name(row.tokens_of, "select"))
            record = select.record if isinstance(select, SelectBlocks) else None
            nan = bool(record.nan_seen) if record is not None and record.nan_seen is not None else False
            words = [row.note, hooked, in_float8(module, row), "NaN among the last scores" if nan else ""]
            rows.append(
                SiteReport(
                    module=name,
                    site=row.site,
                    eliminated=row.eliminated,
                    score=row.score,
                    budget=row.budget,
                    kept_tokens=record.kept_tokens if record and record.total_tokens else None,
                    total_tokens=record.total_tokens if record and record.total_tokens else None,
                    recall=recalls.get((name, row.site)),
                    note="; ".join(filter(None, words)),
                )
            )
    steps = [record.settings.step for _, _, record in installed(model)]
    held = base_in_float8(model, done.config)
    unlabelled = [UNLABELLED] if any(step.unlabelled for step in steps) else []
    notes = [*done.notes, *held, *unlabelled, *lowerings(model, done.config.block_size)]
    return Report(config=done.config, sites=rows, notes=notes, dense=any(step.dense for step in steps))


def _check_batch(model: nn.Module, batch: object) -> None:
    """Raise InputError where `recall_on` is not what the model can be called with."""
    if not isinstance(batch, Mapping):
        raise InputError(f"recall_on takes a batch, {{'input_ids': ...}}, not {type(batch).__name__}")
    ids: Any = batch.get("input_ids")
    given: Any = batch.get("inputs_embeds") if ids is None else ids
    if not isinstance(given, torch.Tensor) or given.dim() != (3 if ids is None else 2) or not given.numel():
        raise InputError("recall_on takes a batch with input_ids [B, S], a tensor of token ids")
    if ids is not None and (ids.is_floating_point() or ids.dtype == torch.bool):
        raise InputError(f"recall_on: token ids are whole numbers, not {ids.dtype}")
    mask = batch.get("attention_mask")
    if isinstance(mask, torch.Tensor) and mask.dim() == 2 and mask.shape != given.shape[:2]:
        raise InputError(f"recall_on: attention_mask {list(mask.shape)} does not fit tokens {list(given.shape[:2])}")
    head = causal_model(model)
    embedding: Any = None if head is None else head.get_input_embeddings()  # type: ignore[operator]
    size = getattr(embedding, "num_embeddings", None)
    if size is not None and ids is not None and ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < size:
        raise InputError(f"recall_on: token ids go from {ids.min()} to {ids.max()}; the model has {size} tokens")


def set_dense(model: Model, dense: bool = True) -> Model:
    """Let the layers run their original code in training too, until told otherwise; the loss stays segmented.

    Call it between steps: `lemo_fx.set_dense(model, step >= 0.85 * steps)` trains the last 15 % densely.
    `lemo_fx.transform` with another plan starts sparse again.

    Raises:
        NotTransformedError: the model was not transformed.
        ConfigError: `dense` is neither true nor false.
    """
    _transformation(model)
    if not isinstance(dense, numbers.Integral | np.bool_) or dense not in (True, False):
        raise ConfigError(f"dense={dense!r} must be True or False")
    if dense and _transformation(model).group is not None:
        raise ConfigError(
            "ranks that share a sequence cannot run the layers' original code: transform with LemoConfig(None, None)"
        )
    for _, module, record in installed(model):
        record.settings.step.dense = bool(dense)
        if dense:
            pass_by(module)
    return model


def shared_by(model: nn.Module) -> SequenceGroup | None:
    """The ranks that share a model's sequences, or None."""
    done = _find(model)
    return None if done is None else done.group


def shard_sequence(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """This rank's part of a batch, where ranks share sequences: arguments [B, L] each of the model's call.

    The model cuts whole batches itself; this is for those who want the part, or its logits. The loss of that call is
    the whole sequences', and gradients are to be averaged over the ranks, as DDP and FSDP2 do.

    Args:
        batch: the same on every rank of the group, which is checked: `input_ids`, `labels`, `attention_mask` [B, S];
            `position_ids` [1 or B, S] that restart where a packed document does; `num_items_in_batch`, the labels of
            all batches of a step, where several are accumulated. It is padded to whole blocks of every part.

    Raises:
        NotTransformedError, ConfigError: the model was not transformed, or without a `sequence_group`.
        InputError: the batch is not of this form, or the ranks hold different ones, or train different weights.
    """
    done = _transformation(model)
    if done.group is None:
        raise ConfigError("the model's ranks share no sequence: lemo_fx.transform(model, sequence_group=...)")
    part = shard(batch, done.group, done.config.sequence_parts * done.config.block_size)
    check_alike(model, batch, done.group)
    return part


@contextmanager
def labels(model: nn.Module, labels: torch.Tensor | None) -> Iterator[None]:
    """Tell the layers which tokens matter where the loss is computed outside the model.

    Blocks with labels are kept: all of them where they are few, else at least two. A model that is called with
    `labels=` tells its layers itself; where the loss is a function of the logits, say it around the call:

        with lemo_fx.labels(model, labels):
            logits = model(input_ids=ids).logits
        loss = my_loss(logits, labels)

    In a Trainer `LemoCallback` does so for `compute_loss_func` and label smoothing.

    Args:
        labels: [B, S], in the places of the calls' tokens: a label, or -100 where a token is no target; or bool, true
            for tokens that matter. The block of the token and of the one before it, from which it is predicted, are
            kept. None changes nothing.

    Raises:
        NotTransformedError: the model was not transformed.
        InputError: these are no labels, or (in the call) not of its shape.
    """
    _transformation(model)
    if labels is not None:
        if not isinstance(labels, torch.Tensor) or labels.dim() != 2 or labels.is_floating_point():
            found = list(labels.shape) if isinstance(labels, torch.Tensor) else type(labels).__name__
            raise InputError(
                f"labels must be a tensor [B, S] of whole numbers, -100 where none is, or bool; not {found}"
            )
        if labels.dtype == torch.bool:
            labels = torch.where(labels, 0, -100)
    steps = {id(record.settings.step): record.settings.step for _, _, record in installed(model)}.values()
    with restored(steps, "labels"):
        for step in steps if labels is not None else ():
            step.labels = labels
        yield


@contextmanager
def suspended(model: nn.Module) -> Iterator[None]:
    """The original model for the time of a with block; a transformation is put back afterwards."""
    before, plans, mixers = _find(model), plans_of(model), mixers_of(model)
    revert(model)
    try:
        yield
    finally:
        _put_back(model, before, plans, mixers)


def _put_back(model: nn.Module, before: Transformation | None, plans: list[Plan], mixers: Sequence[nn.Module]) -> None:
    if before is not None:
        install(plans, _holder(model), anatomy_of(model).holders, mixers)
        vars(_holder(model))[TRANSFORMATION] = before


def _holder(model: nn.Module) -> nn.Module:
    """Where a model's transformation is kept: its base model under any adapter wrapper."""
    for module in model.modules():
        if vars(module).get(TRANSFORMATION) is not None:
            return module
    return anatomy_of(model).base


def _find(model: nn.Module) -> Transformation | None:
    return vars(_holder(model)).get(TRANSFORMATION)


def _transformation(model: nn.Module) -> Transformation:
    require_model(model, "lemo_fx")
    done = _find(model)
    if done is None:
        raise NotTransformedError(
            f"this {type(model).__name__} was not transformed: call lemo_fx.transform(model) first"
        )
    return done
