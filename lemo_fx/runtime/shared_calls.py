"""Calls of a causal model whose ranks share sequences: each runs a part, and callers get what is of the whole."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from lemo_fx import distributed
from lemo_fx.config import LemoConfig
from lemo_fx.errors import InputError
from lemo_fx.graph.capture import CACHE_NAMES
from lemo_fx.runtime.logits import NO_LOGITS, LateLogits
from lemo_fx.runtime.parts import IGNORED, SequenceGroup, check_alike, check_known, is_told, restarts, shard, tell
from lemo_fx.runtime.sequence import gather_tokens, whole_loss

SWITCHES = ("return_dict", "fused_lm_head")
"""Arguments that say nothing of single tokens."""


def wanted(model: nn.Module, kwargs: Mapping[str, Any], name: str) -> bool:
    """Whether a call asks a causal model for something, or says nothing and the model's config asks for it."""
    asked = kwargs.get(name)
    return bool(getattr(model.config, name, False) if asked is None else asked)


def _no_logits() -> torch.Tensor:
    raise InputError(
        "each of the ranks that share a sequence has the logits of its part only: use the loss, or call the model with "
        "what lemo_fx.shard_sequence returns for those"
    )


@dataclass(frozen=True)
class PartCall:
    """A call of a causal model with a part of a sequence.

    Attributes:
        arguments: of its forward, by name.
        labels: [B, L + 1], of the part and of the token that follows it.
        length: S, where the caller gave whole sequences and is to get back what is of them; None where it gave a part.
        adds_up: whether the caller adds up what the parts return (the Trainer under accelerate's `sp_size`).
    """

    group: SequenceGroup
    arguments: dict[str, Any]
    labels: torch.Tensor
    length: int | None = None
    adds_up: bool = False

    @torch.compiler.disable
    def whole(self, output: Any) -> Any:
        """What the caller gets: the loss of the whole sequences and, where it gave those, values [B, S - 1] of tokens.

        Gradients of both are to be averaged over the ranks.
        """
        if self.adds_up:
            return output
        if isinstance(output, tuple):
            raise InputError("return_dict=False: a part's loss is found by its name only; call with return_dict=True")
        found = {name: value for name, value in output.items() if value is not None}
        if "loss" in found:
            output["loss"] = whole_loss(found.pop("loss"), self.group)
        if self.length is None:
            return output
        for name, value in found.items():
            if value is NO_LOGITS:
                continue
            if name == "logits":
                shape = (len(value), self.length, value.shape[-1])
                output[name] = LateLogits(_no_logits, shape, value.dtype, value.device, False)
            elif isinstance(value, torch.Tensor) and value.shape == self.arguments["input_ids"].shape:
                output[name] = gather_tokens(value, self.group)[:, : self.length - 1]
            else:
                raise InputError(f"{name}: each of the ranks that share a sequence has those of its part only")
        return output


@torch.compiler.disable
def part_of(
    model: nn.Module, group: SequenceGroup, config: LemoConfig, given: Mapping[str, Any], sparse: bool
) -> PartCall | None:
    """What a call becomes; None where whole sequences go through layers that run their original code.

    Args:
        given: the call's arguments by name.
        sparse: whether the layers run rewritten.

    Raises:
        InputError: it asks for what a part cannot give, or the ranks' calls are not one.
        UnsupportedModelError: the rewritten layers would be shown parts that they do not know of.
    """
    if model.training or config.active == "always":
        distributed.refuse_process(model, group.size)
    told = is_told(given.get("attention_mask"))
    if not sparse:
        if told:
            raise InputError(
                "a part of a sequence is for training, and layers that run their original code would attend within it "
                "alone: call the model in eval(), in generate() and while it is dense with whole sequences"
            )
        return None
    if wanted(model, given, "output_router_logits"):
        raise InputError(
            "output_router_logits: the auxiliary loss of a part is no share of the whole sequence's; train without"
        )
    if told:
        if given.get("fused_lm_head"):
            raise InputError("TRL computes its loss of the tokens it gave: call the model with the whole sequences")
        return PartCall(group, dict(given), _labels(given))
    if given.get("use_cache") or any(given.get(name) is not None for name in CACHE_NAMES):
        raise InputError(
            "a call that asks for a cache or brings one runs the layers' original code, which cannot run on a part of "
            "a sequence: train with use_cache=False"
        )
    # False and 0 ask for nothing (output_hidden_states, logits_to_keep).
    asked_for = {name: value for name, value in given.items() if isinstance(value, torch.Tensor) or value}
    switches = {name: given[name] for name in SWITCHES if given.get(name) is not None}
    batch = {name: value for name, value in asked_for.items() if name not in SWITCHES}
    multiple = config.sequence_parts * config.block_size
    if distributed.accelerates_parts() > 1:
        part, labels = tell_part(batch, group, multiple // group.size)
        return PartCall(group, part | switches, labels, adds_up=True)
    if given.get("labels") is None:
        raise InputError(
            "ranks that share a sequence have logits of their parts only, so that the model has to compute the loss: "
            "call it with labels, without a loss of your own (compute_loss_func, label smoothing)"
        )
    part = shard(batch, group, multiple)
    check_alike(model, batch, group)
    return PartCall(group, part | switches, _labels(part), batch["input_ids"].shape[1])


def _labels(part: Mapping[str, Any]) -> torch.Tensor:
    shifted = part.get("shift_labels")
    if not isinstance(shifted, torch.Tensor) or part.get("num_items_in_batch") is None:
        raise InputError(
            "a part of a sequence comes with shift_labels and num_items_in_batch, which count beyond its ends: call "
            "the model with all that lemo_fx.shard_sequence returns"
        )
    return torch.cat([part["labels"], shifted[:, -1:]], dim=1)


def tell_part(batch: Mapping[str, Any], group: SequenceGroup, multiple: int) -> tuple[dict[str, Any], torch.Tensor]:
    """(arguments, labels [B, L + 1]) of a part that DeepSpeed's data loader cut, told of the whole.

    Args:
        multiple: of tokens, that the part has to be.
    """
    check_known(batch, ("input_ids", "position_ids", "attention_mask", "labels", "shift_labels", "use_cache"))
    ids, positions, shifted, mask = (
        batch.get(name) for name in ("input_ids", "position_ids", "shift_labels", "attention_mask")
    )
    if ids is None or positions is None or shifted is None:
        raise InputError(
            "accelerate's sp_size hands every rank input_ids, position_ids and shift_labels of its part: train by "
            "transformers' or TRL's Trainer, which wrap the data loader"
        )
    if ids.shape[1] % multiple:
        raise InputError(
            f"accelerate's sp_size cut sequences into parts of {ids.shape[1]} tokens, which are no whole blocks: let "
            f"the collator pad to multiples of {multiple * group.size} (pad_to_multiple_of)"
        )
    valid = None if mask is None else gather_tokens(mask.bool(), group)
    valid = None if valid is None or bool(valid.all()) else valid
    places = gather_tokens(positions.contiguous(), group)
    predicted = gather_tokens(shifted.contiguous(), group)
    told = tell(valid, places if mask is None and restarts(places) else None, predicted)
    labels = functional.pad(predicted, (1, 0), value=IGNORED)
    length = ids.shape[1]
    part = {
        "input_ids": ids.contiguous(),
        "position_ids": positions.contiguous(),
        "attention_mask": told.to(ids.device),
        "labels": shifted.contiguous(),
        "shift_labels": shifted.contiguous(),
        # A rank without labels has a loss of 0, and not of 0 / 0.
        "num_items_in_batch": (shifted != IGNORED).sum().clamp(min=1),
    }
    return part, labels[:, group.rank * length : (group.rank + 1) * length + 1]
