"""Token ids as users give them, each sequence as a [1, S] tensor, and whether a model can read them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from lemo_fx.errors import ConfigError, InputError
from lemo_fx.graph.anatomy import has_rope, longest_context


def read_sequences(model: nn.Module, sequences: Any, block_size: int) -> list[torch.Tensor]:
    """Each sequence as a [1, S] tensor of token ids.

    Raises:
        InputError: no sequence, not token ids, more of them than the model reads, or a mask that does not fit them.
        ConfigError: no sequence fills a block of tokens.
    """
    batches = list(_batches(sequences))
    if not batches:
        raise InputError("fit needs at least one sequence of token ids")
    longest = max(ids.shape[1] for ids in batches)
    if longest < 2:
        raise InputError("every sequence is a single token: there is nothing to choose from")
    most = longest_context(getattr(model, "config", None))
    words = getattr(model.get_input_embeddings(), "num_embeddings", torch.inf)  # type: ignore[operator]
    for number, ids in enumerate(batches):
        if most is not None and ids.shape[1] > most:
            more = ", or set rope scaling in the model's config" if has_rope(model.config) else ""
            raise InputError(
                f"sequence {number} has {ids.shape[1]} tokens; {type(model).__name__} reads up to {most}: cut it{more}"
            )
        if ids.min() < 0 or ids.max() >= words:
            raise InputError(
                f"sequence {number} holds token ids from {ids.min()} to {ids.max()}; the model has {words} tokens: was "
                "the text encoded by its own tokenizer?"
            )
    if most is not None and block_size > most:
        raise ConfigError(
            f"block_size={block_size}: the model reads up to {most} tokens, less than one block: lower it"
        )
    if block_size > longest:
        raise ConfigError(
            f"block_size={block_size}: the longest sequence has {longest} tokens, less than one block: give longer "
            "ones, or lower it"
        )
    return batches


def _batches(sequences: Any) -> Iterator[torch.Tensor]:
    """Each sequence as a [1, S] tensor: no padding, whatever the lengths, and none of what a mask takes for padding."""
    if isinstance(sequences, str) or not isinstance(sequences, Iterable):
        raise InputError(f"{_TOKEN_IDS}, not {type(sequences).__name__}")
    for number, row in enumerate(sequences):
        try:
            fields = dict(row) if hasattr(row, "keys") else {"input_ids": row}
            ids = _tensor(fields["input_ids"])
            mask = fields.get("attention_mask")
            mask = None if mask is None else _tensor(mask)
        except (TypeError, ValueError, KeyError) as error:
            raise InputError(f"{_TOKEN_IDS}: {error}") from error
        if ids.dim() != 1 or ids.is_floating_point() or ids.numel() == 0:
            raise InputError(_TOKEN_IDS)
        if mask is not None:
            if mask.shape != ids.shape or not ((mask == 0) | (mask == 1)).all():
                raise InputError(
                    f"sequence {number}: its attention_mask {list(mask.shape)} must hold a 1 or a 0 for each of its "
                    f"{len(ids)} token ids"
                )
            # Its real tokens alone give what they give beside padding, on whichever side that is.
            ids = ids[mask.bool().to(ids.device)]
            if not len(ids):
                raise InputError(f"sequence {number}: its attention_mask leaves no token")
        yield ids.long()[None]


def _tensor(values: Any) -> torch.Tensor:
    return torch.as_tensor(values if isinstance(values, Sequence | torch.Tensor) else list(values))


_TOKEN_IDS = "sequences must be token ids: a list of lists, a [N, S] tensor, or rows with 'input_ids'"
