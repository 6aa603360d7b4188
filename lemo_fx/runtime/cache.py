"""Calls of the modules that hold the rewritten layers: they make no cache by default, and hand on their labels."""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from lemo_fx.config import LemoConfig
from lemo_fx.graph.anatomy import text_config
from lemo_fx.graph.capture import CACHE_NAMES, by_name
from lemo_fx.runtime.hooks import look_for_hooks
from lemo_fx.runtime.layer import CHECKPOINTS_ALWAYS, STATE
from lemo_fx.runtime.step import Step

TELLER = "_lemo_fx_teller"
"""Instance attribute of a module above rewritten layers: handles of its `Teller`'s hooks."""


def without_default_cache(
    model: nn.Module, settings: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Default `use_cache` to False where layers run sparse: transformers would make a cache, which they cannot fill.

    Said to the call and not in the model's config, which is saved with the model and holds in `eval()` too.

    Without a cache and a mask transformers takes restarting positions for documents. Where the model would have made a
    cache, a mask of ones says that they are none.
    """
    given = by_name(settings.arguments, args, kwargs)
    said = any(given.get(name) is not None for name in ("use_cache", *CACHE_NAMES))
    if said or "use_cache" not in settings.arguments or not (settings.config.active == "always" or model.training):
        return args, kwargs
    changed: dict[str, Any] = {"use_cache": False}
    inputs = given.get("inputs_embeds") if given.get("input_ids") is None else given["input_ids"]
    numbered = given.get("position_ids") is not None and given.get("attention_mask") is None
    if numbered and isinstance(inputs, torch.Tensor) and _makes_a_cache(model):
        changed["attention_mask"] = torch.ones(inputs.shape[:2], dtype=torch.long, device=inputs.device)
    in_place = dict(zip(settings.arguments, args, strict=False))
    more = {name: value for name, value in changed.items() if name not in in_place}
    return tuple({**in_place, **changed}[name] for name in in_place), {**kwargs, **more}


def _makes_a_cache(model: nn.Module) -> bool:
    """Whether a call that says nothing of a cache makes one in the original model, which checkpointing forbids."""
    text = text_config(model.config)
    checkpoints = model.training and (CHECKPOINTS_ALWAYS or torch.is_grad_enabled())
    forbids = checkpoints and any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    return bool(getattr(text, "use_cache", False)) and not forbids


@dataclass
class Teller:
    """Hooks of a module above the decoder layers that is no causal model, and which people call by itself too.

    Attributes:
        arguments: names of its forward's arguments.
        before: labels that the layers knew before the running calls.
    """

    config: LemoConfig
    step: Step
    arguments: tuple[str, ...]
    before: list[torch.Tensor | None] = field(default_factory=list)

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Before its forward: a step begins; tell the layers its labels."""
        given = by_name(self.arguments, args, kwargs)
        if not torch.compiler.is_compiling():
            look_for_hooks(module, self.step)
        self.step.scores = None
        self.before.append(self.step.labels)
        if given.get("labels") is not None:
            self.step.labels = given["labels"]
        return without_default_cache(module, self, args, kwargs)

    def leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """After it: the layers are through."""
        self.step.labels = self.before.pop()

    def __deepcopy__(self, memo: dict[int, Any]) -> Teller:
        return Teller(self.config, copy.deepcopy(self.step, memo), self.arguments)

    def __reduce__(self) -> tuple:
        # Pickled layers are not rewritten: nobody is to be told.
        return Teller, (LemoConfig(), Step(), ())


def add_teller(module: nn.Module, config: LemoConfig, step: Step, labels: bool) -> None:
    """Put the hooks on a module whose forward takes a cache (or `labels`); on others there is nothing to tell."""
    arguments = tuple(inspect.signature(module.forward).parameters)
    told = "use_cache" in arguments or (labels and "labels" in arguments)
    if not told or STATE in vars(module):
        return
    teller = Teller(config, step, arguments)
    vars(module)[TELLER] = (
        module.register_forward_pre_hook(teller.enter, with_kwargs=True),
        module.register_forward_hook(teller.leave, always_call=True),
    )
