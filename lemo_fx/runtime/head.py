"""Run-time entry points of rewritten causal models: per call, the loss in segments or the original forward."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import nn
from transformers.utils.generic import can_return_tuple

from lemo_fx import distributed
from lemo_fx.config import LemoConfig
from lemo_fx.errors import InputError
from lemo_fx.graph.capture import CACHE_NAMES, by_name, restored
from lemo_fx.graph.left_out import kind_of
from lemo_fx.kernels.private import in_transform
from lemo_fx.runtime.cache import without_default_cache
from lemo_fx.runtime.captured import CapturedHead
from lemo_fx.runtime.hooks import look_for_hooks
from lemo_fx.runtime.layer import STATE, refuse_function_transforms, settings_of, warn_once
from lemo_fx.runtime.loss import rows_of, saves_memory, segmentable
from lemo_fx.runtime.parts import SequenceGroup
from lemo_fx.runtime.readers import refuse_readers
from lemo_fx.runtime.shared_calls import part_of, wanted
from lemo_fx.runtime.step import Step

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SegmentedLoss:
    """Which calls of a causal model its graph with the loss in segments is for.

    Attributes:
        loss_function: the model's, when it was captured.
        slices_itself: whether the graph takes `logits_to_keep` as the model's callers give it.
        presence: arguments whose absence changes the head -> whether the graph is for calls with them.
        left_out: arguments that the graph does not use -> the kind of value (`kind_of`) that they have where left out.
    """

    loss_function: Callable
    slices_itself: bool
    presence: Mapping[str, bool]
    left_out: Mapping[str, Any]
    captured: CapturedHead

    def takes(self, model: nn.Module, kwargs: Mapping[str, Any]) -> bool:
        """Whether it is for this call of the model as it is now."""
        return (
            model.loss_function is self.loss_function
            and all((kwargs.get(name) is not None) == given for name, given in self.presence.items())
            and all(name not in kwargs or kind_of(kwargs[name]) == kind for name, kind in self.left_out.items())
            and self._unchanged(model)
        )

    def _unchanged(self, model: nn.Module) -> bool:
        same = torch.compiler.is_compiling() or self.captured.unchanged(model)
        if not same:
            warn_once(
                f"a number or switch that the forward of {type(model).__name__} reads has changed since "
                "lemo_fx.transform, so its loss is no longer segmented: lemo_fx.revert and lemo_fx.transform again"
            )
        return same


@dataclass
class HeadSettings:
    """What a rewritten causal model asks before each forward.

    Attributes:
        sparse_experts: whether a branch that runs on kept tokens holds experts.
        segmented: None where its loss is the original's.
    """

    config: LemoConfig
    step: Step
    arguments: tuple[str, ...]
    sparse_experts: bool
    segmented: SegmentedLoss | None = None
    group: SequenceGroup | None = None
    weights_checked: bool = False

    def begin(self, model: nn.Module) -> None:
        """Look at what may have become of the model since the step before; not in compiled code, which asks once.

        Raises:
            UnsupportedModelError: the rewritten layers would be shown parts, or an adapter reads a held weight.
        """
        alone = not torch.distributed.is_initialized() and not vars(model).get("_is_replica")
        if not alone and (model.training or self.config.active == "always"):
            if self.group is None:  # Else `part_of` has asked.
                distributed.refuse_process(model)
            if not self.weights_checked:
                # At the first step, since models are sharded after the transform; a walk through all modules.
                distributed.refuse_cut_weights(model)
                for name, module in model.named_modules():
                    if STATE in vars(module) and module is not model:
                        distributed.refuse_finer_units(name, module)
                self.weights_checked = True
        look_for_hooks(model, self.step)
        tried: set[tuple] = set()

        def check(layer: nn.Module) -> None:
            # Adapters that came since the transform.
            refuse_readers(next(name for name, module in model.named_modules() if module is layer), layer, tried)

        for switch in self.step.switches:
            switch.refresh(check)
        if model.training and torch.is_grad_enabled():
            note_unlabelled(self.step)

    def check(self, model: nn.Module, kwargs: Mapping[str, Any]) -> None:
        """Raise where a call asks for what rewritten layers cannot give."""
        if not model.training or self.step.dense:
            return
        refuse_function_transforms(type(model).__name__)
        if wanted(model, kwargs, "output_attentions") and self.config.attention is not None:
            raise InputError(
                "output_attentions: in training, rewritten layers attend with the kept tokens besides, and what is "
                "collected is no longer one matrix a layer; ask for it in eval()"
            )
        if wanted(model, kwargs, "output_router_logits") and self.sparse_experts:
            raise InputError(
                "output_router_logits: the auxiliary loss counts every token, but the experts of rewritten layers see "
                "only the kept ones; leave the sites that hold experts dense, LemoConfig(mlp=None) in most models, or "
                "train without the auxiliary loss"
            )

    def segments(self, model: nn.Module, labels: Any, kwargs: Mapping[str, Any]) -> bool:
        """Whether this call computes the loss in segments, and logits only once they are used."""
        return (
            self.segmented is not None
            and (model.training or not torch.compiler.is_compiling())
            and labels is not None
            and (torch.compiler.is_compiling() or not in_transform())
            and not wanted(model, kwargs, "output_router_logits")
            and not kwargs.get("return_logits")
            and self.segmented.takes(model, kwargs)
            and wanted(model, kwargs, "return_dict")  # In a tuple the logits have a place.
            and segmentable(head := model.get_output_embeddings())  # type: ignore[operator]
            and (model.training or saves_memory(labels.numel(), rows_of(head), self.config.loss_segments))
        )


def head_methods(kind: Any, graph_forward: Callable) -> dict[str, Any]:
    """The methods of a causal model of a class, with rewritten layers, by name."""
    generate = {"generate": make_generate(kind.generate)} if hasattr(kind, "generate") else {}
    return {"forward": HeadForward(in_segments(kind.forward, graph_forward)), **generate}


def in_segments(original: Callable, graph_forward: Callable) -> Callable:
    """The forward of a causal model that computes the loss in segments where it can."""
    graph_forward = can_return_tuple(graph_forward)

    @functools.wraps(original)
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        settings = settings_of(self)
        if settings is None:
            return original(self, *args, **kwargs)
        given = by_name(settings.arguments, args, kwargs)
        if not settings.segments(self, given.get("labels"), given):
            return original(self, *args, **kwargs)
        own = next((name for name in CACHE_NAMES if name in settings.arguments), None)
        for name in CACHE_NAMES:
            if own is not None and name != own and given.get(name) is not None:
                # An older name, which a decorator of the original forward would have translated.
                given[own] = given.pop(name)
        if not settings.segmented.slices_itself and isinstance(given.get("logits_to_keep", 0), int):
            given["logits_to_keep"] = slice(-given.get("logits_to_keep", 0), None)
        return graph_forward(self, **given)

    return forward


def make_generate(original: Callable) -> Callable:
    """The `generate` of a causal model with rewritten layers, whose original code runs in training mode too.

    A forward cannot tell: an outer checkpoint's first pass and the reference of a preference loss, without gradient but
    as sparse as what follows, look like a step of `generate(use_cache=False)`.
    """

    @functools.wraps(original)
    def generate(self, *args: Any, **kwargs: Any) -> Any:
        settings = settings_of(self)
        if settings is None or settings.config.active == "always":
            return original(self, *args, **kwargs)
        with restored([settings.step], "dense"):
            settings.step.dense = True
            return original(self, *args, **kwargs)

    return generate


class HeadForward:
    """The `forward` of a causal model's class: checks each call and tells the layers its labels, whatever then runs.

    Libraries put a forward of their own on the instance (TRL its fused head, accelerate its autocast), before or after
    `transform`; an attribute of the class that takes precedence over the instance's sees to those calls as well.
    """

    def __init__(self, forward: Callable) -> None:
        self.forward = telling_labels(forward)

    def __get__(self, model: nn.Module | None, owner: type | None = None) -> Callable:
        if model is None:
            return self.forward
        own = vars(model).get("forward")
        forward = self.forward
        if own is not None:
            # As a function that takes the instance.
            forward = telling_labels(functools.wraps(own)(lambda self, *args, **kwargs: own(*args, **kwargs)))
        # Dynamo does not trace the making of a bound method; libraries look for one (accelerate for `__func__`).
        return functools.partial(forward, model) if torch.compiler.is_compiling() else MethodType(forward, model)

    def __set__(self, model: nn.Module, forward: Callable) -> None:
        vars(model)["forward"] = forward

    def __delete__(self, model: nn.Module) -> None:
        if vars(model).pop("forward", None) is None:
            raise AttributeError("forward")


def _check_labels(step: Step, given: Mapping[str, Any]) -> None:
    """Raise where what `lemo_fx.labels` says is not about this call's tokens."""
    ids = given.get("input_ids")
    inputs = given.get("inputs_embeds") if ids is None else ids
    if step.labels is not None and isinstance(inputs, torch.Tensor) and inputs.shape[:2] != step.labels.shape:
        raise InputError(
            f"lemo_fx.labels was given {list(step.labels.shape)}, but this call has {list(inputs.shape[:2])} tokens: "
            "give labels [B, S] for the tokens of the calls in its with block"
        )


UNLABELLED = (
    "the last step came without labels, so that any block may be dropped, an answer's too; where the loss is computed "
    "outside the model and on few tokens, say on which: with lemo_fx.labels(model, labels)"
)


def note_unlabelled(step: Step) -> None:
    """Note for the report whether a step that trains came without labels, and warn of the first one."""
    if step.labels is None and step.unlabelled is None:
        logger.warning(UNLABELLED)
    step.unlabelled = step.labels is None


def telling_labels(forward: Callable) -> Callable:
    """A causal model's forward with its call checked, and whose rewritten layers know the labels while it runs."""

    @functools.wraps(forward)
    def told(self, *args: Any, **kwargs: Any) -> Any:
        settings = settings_of(self)
        if settings is None:
            return forward(self, *args, **kwargs)
        args, kwargs = without_default_cache(self, settings, args, kwargs)
        given = by_name(settings.arguments, args, kwargs)
        step = settings.step
        sparse = (self.training or settings.config.active == "always") and not step.dense
        part = None if settings.group is None else part_of(self, settings.group, settings.config, given, sparse)
        settings.check(self, kwargs)
        if part is not None:
            args, kwargs = without_default_cache(self, settings, (), part.arguments)
        before = step.labels
        if given.get("labels") is not None:
            step.labels = given["labels"] if part is None else part.labels
        else:
            _check_labels(step, given)
        try:
            if not torch.compiler.is_compiling():
                settings.begin(self)
            output = forward(self, *args, **kwargs)
        finally:
            step.labels = before
            step.scores = None
        return output if part is None else part.whole(output)

    return told
