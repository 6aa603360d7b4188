"""The parts of a sequence that several ranks share: which rank has which, and what each is told of the whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn import functional

from lemo_fx.errors import ConfigError, InputError
from lemo_fx.kernels.block_scores.reference import mix
from lemo_fx.runtime.kept import document_ids

IGNORED = -100
"""Label of a token that is no target."""

_groups: dict[str, dist.ProcessGroup] = {}


@dataclass(frozen=True)
class SequenceGroup:
    """The ranks that share a sequence, in the order of its parts.

    Attributes:
        name: of torch's process group; a copy of a model shares it.
        rank: of this process in it, which is the number of its part.
        size: of it, P.
    """

    name: str
    rank: int
    size: int

    @classmethod
    def of(cls, group: dist.ProcessGroup) -> SequenceGroup:
        """From torch's process group; a ConfigError where it is none."""
        if not isinstance(group, dist.ProcessGroup):
            raise ConfigError(
                "sequence_group must be a process group, torch.distributed.new_group(ranks), of this rank's, not "
                f"{type(group).__name__}"
            )
        _groups[group.group_name] = group
        return cls(group.group_name, dist.get_rank(group), group.size())

    @property
    def process_group(self) -> dist.ProcessGroup:
        """Torch's."""
        return process_group(self.name)


def process_group(name: str) -> dist.ProcessGroup:
    """Torch's, by its name."""
    return _groups[name]


# What attention and the choice of blocks must know of the whole sequence takes the place of the attention mask, which
# transformers hands on to every layer as it is if it has four dimensions. An attention that is not told (a layer's
# original code) cannot take it for a mask: its dtype is none of a mask's, and its shape does not fit.


def tell(
    valid: torch.Tensor | None, position_ids: torch.Tensor | None, predicted: torch.Tensor | None = None
) -> torch.Tensor:
    """The `attention_mask` [B, 1, rows, S] int64 of a call with a part of a sequence.

    Row 0 holds 1 for tokens and 0 for padding, row 1 the number of each token's document, -1 for padding. There are no
    rows where every token is real and no documents have to be kept apart, and one row where padding is all at the end,
    to which causal attention never looks, and predicts nothing.

    Args:
        valid: [B, S] bool, False on padding; None where there is none.
        position_ids: [1 or B, S], which restart where a document does; None where they do not.
        predicted: [B, S] the label that each token predicts, -100 where none.
    """
    documents = None if position_ids is None else document_ids(position_ids)
    if valid is None and documents is None:
        return torch.empty(1, 1, 0, 0, dtype=torch.int64)
    example = documents if valid is None else valid
    assert example is not None
    real = torch.ones_like(example, dtype=torch.int64) if valid is None else valid.long()
    rows = [real]
    predicts = predicted is not None and bool(((predicted != IGNORED) & (real == 0)).any())
    if documents is not None or predicts or bool((real.diff(dim=1) > 0).any()):
        apart = torch.zeros_like(real) if documents is None else documents.expand_as(real)
        rows.append(torch.where(real > 0, apart, -1))
    return torch.stack(rows, dim=1)[:, None]


def is_told(mask: Any) -> TypeGuard[torch.Tensor]:
    """Whether a layer's `attention_mask` is what `tell` made."""
    return isinstance(mask, torch.Tensor) and mask.dtype == torch.int64 and mask.dim() == 4


def restarts(position_ids: torch.Tensor) -> bool:
    """Whether positions [B, S] restart, where documents begin."""
    return bool((document_ids(position_ids) > 0).any())


def mask_within(mask: Any) -> Any:
    """The mask of an attention that is told of the whole sequence otherwise: none; any other mask as it is."""
    return None if is_told(mask) else mask


TAKEN = ("input_ids", "labels", "attention_mask", "position_ids", "num_items_in_batch", "use_cache")
"""What a batch may hold that is cut into parts."""

UNREAD = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")
"""What collators say of packed documents besides position_ids: `sdpa` and `eager` attention do not read it."""


def check_known(batch: Mapping[str, Any], names: Sequence[str]) -> None:
    """Raise where a batch holds what is not known to be of one entry a token, or of none."""
    unknown = [name for name, value in batch.items() if value is not None and name not in (*names, *UNREAD)]
    if unknown:
        raise InputError(
            f"the batch holds {', '.join(unknown)}, of which is not known how it is cut into parts; known are "
            f"{', '.join(names)}"
        )


def shard(batch: Mapping[str, Any], group: SequenceGroup, multiple: int) -> dict[str, Any]:
    """A rank's part of a batch, padded at its end to a multiple of tokens, see `lemo_fx.shard_sequence`."""
    check_known(batch, TAKEN)
    ids = batch.get("input_ids")
    if not isinstance(ids, torch.Tensor) or ids.dim() != 2:
        raise InputError("shard_sequence takes a batch with input_ids [B, S], a tensor of token ids")
    batch_size, length = ids.shape
    for name, rows in (("labels", (batch_size,)), ("attention_mask", (batch_size,)), ("position_ids", (1, batch_size))):
        value = batch.get(name)
        shape = list(getattr(value, "shape", ()))
        if value is not None and (len(shape) != 2 or shape[0] not in rows or shape[1] != length):
            raise InputError(f"{name} of shape {shape} does not fit input_ids of shape {list(ids.shape)}")
    mask, positions, labels = batch.get("attention_mask"), batch.get("position_ids"), batch.get("labels")
    valid = None if mask is None or bool(mask.bool().all()) else mask.bool()
    missing = -length % multiple
    if missing and valid is None:
        valid = torch.ones_like(ids, dtype=torch.bool)
    restarting = None
    # As in transformers, where documents are told apart only without a mask.
    if positions is not None and mask is None and restarts(positions):
        restarting = positions
    if positions is None:
        positions = torch.arange(length, device=ids.device)[None]

    def padded(values: torch.Tensor, fill: int) -> torch.Tensor:
        return functional.pad(values, (0, missing), value=fill)

    def own(values: torch.Tensor) -> torch.Tensor:
        return values.chunk(group.size, dim=1)[group.rank].contiguous()

    whole = None if valid is None else padded(valid, False)
    if labels is not None:
        labels = padded(labels, IGNORED)
    shifted = None if labels is None else functional.pad(labels, (0, 1), value=IGNORED)[:, 1:]
    part = {
        "input_ids": own(padded(ids, 0)),
        "position_ids": own(padded(positions, 0)).expand(batch_size, -1),
        "attention_mask": tell(whole, None if restarting is None else padded(restarting, 0), shifted).to(ids.device),
    }
    if labels is not None and shifted is not None:
        count = batch.get("num_items_in_batch")
        part |= {
            "labels": own(labels),
            "shift_labels": own(shifted),
            "num_items_in_batch": (shifted != IGNORED).sum() if count is None else count,
        }
    return part


def check_alike(model: nn.Module, batch: Mapping[str, Any], group: SequenceGroup) -> None:
    """Raise where the ranks of a group hold different batches, whose parts would be joined to sequences of no text, or
    train weights of their own."""
    ids = batch["input_ids"]
    device = torch.device("cpu") if dist.get_backend(group.process_group) == "gloo" else ids.device
    own = torch.stack([_content(batch, ids.device), _weights(model).to(ids.device)]).to(device)
    every = [torch.empty_like(own) for _ in range(group.size)]
    dist.all_gather(every, own, group=group.process_group)
    numbers = torch.stack(every)
    batches, weights = (not torch.equal(part, part[:1].expand_as(part)) for part in numbers.split(1, dim=1))
    if batches:
        raise InputError(
            "the ranks that share a sequence hold different batches: give all of them the same one (no "
            "DistributedSampler within the group, the same seed, the same padding); a Trainer does where it is a "
            "lemo_fx.SequenceParallelTrainer"
        )
    if weights:
        raise InputError(
            "the ranks that share a sequence train different weights: make the same adapters on every rank "
            "(torch.manual_seed before get_peft_model), and average the gradients over the ranks before every "
            "optimizer step, by DDP, FSDP2 or dist.all_reduce"
        )


def _content(batch: Mapping[str, Any], device: torch.device) -> torch.Tensor:
    """[] int64: a hash of every entry of a batch, and of its place."""
    total = torch.zeros((), dtype=torch.int64, device=device)
    for number, name in enumerate(TAKEN):
        value = batch.get(name)
        if value is not None:
            entries = torch.as_tensor(value, device=device).long()
            places = torch.arange(entries.numel(), device=device).view(entries.shape)
            for size in entries.shape:
                total = mix(total + size)
            total = mix(total + mix(entries + mix(places + 1)).sum() + number)
    return total


WEIGHTS = 65536
"""Numbers of a model's first trained weight by which ranks are compared."""


def _weights(model: nn.Module) -> torch.Tensor:
    """[] int64: tells trained weights apart; zero where they are cut into pieces, another on every rank."""
    trained = next((p for p in model.parameters() if p.requires_grad), None)
    if trained is None or isinstance(trained, DTensor) or not trained.is_floating_point():
        return torch.zeros((), dtype=torch.int64)
    total = trained.detach().flatten()[:WEIGHTS].double().sum()
    return total.nan_to_num().view(torch.int64)
