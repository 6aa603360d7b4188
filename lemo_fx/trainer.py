"""A transformers Trainer whose ranks share sequences; also a base class for Trainers of other libraries."""

from __future__ import annotations

import torch.distributed as dist
from accelerate.data_loader import DataLoaderDispatcher
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

from lemo_fx.api import shared_by
from lemo_fx.distributed import accelerates_parts
from lemo_fx.errors import ConfigError
from lemo_fx.runtime.parts import SequenceGroup


class SequenceParallelTrainer(Trainer):
    """transformers' Trainer for models that were transformed with a `sequence_group`.

    The ranks of a group are given the same batches; everything else is done by the model, which computes the loss of
    the whole sequences from the parts of all of them. Other Trainers become one by inheritance:

        class SharingSFTTrainer(lemo_fx.SequenceParallelTrainer, trl.SFTTrainer):
            pass

    Evaluation gives every rank sequences of its own, whole.
    """

    def get_total_train_batch_size(self, args: TrainingArguments) -> int:
        """Samples of an optimizer step; the ranks of a group have the same ones."""
        group = self._group()
        return super().get_total_train_batch_size(args) // (1 if group is None else group.size)

    def _group(self) -> SequenceGroup | None:
        """The ranks that are to have the same batches; under accelerate's `sp_size` it cuts batches of its own."""
        return None if accelerates_parts() > 1 else shared_by(self.model)

    def get_train_dataloader(self) -> DataLoader:
        """The Trainer's own, with the same batches on every rank of a group.

        Raises:
            ConfigError: samplers or settings that cannot give them.
        """
        group = self._group()
        if group is None:
            return super().get_train_dataloader()
        ranks, groups = dist.get_process_group_ranks(group.process_group), self.args.world_size // group.size
        first = self.args.process_index // group.size * group.size
        if ranks != list(range(first, first + group.size)) or groups * group.size != self.args.world_size:
            raise ConfigError(
                f"sequence_group is of ranks {ranks}, but a Trainer's batches go to neighbouring ranks: make it the "
                "last dimension of init_device_mesh(device, (samples, parts), mesh_dim_names=('samples', 'parts'))"
            )
        if self.args.train_sampling_strategy == "batch_rebalance":
            raise ConfigError(
                "train_sampling_strategy='batch_rebalance' gives every rank other batches, but the ranks share their "
                "sequences: use 'group_by_length'"
            )
        if hasattr(self, "_tp_size"):
            self._tp_size = group.size  # TRL's: by how much it counts too many tokens
        # accelerate gives ranks that hold a layer in pieces ("tp") the same batches; nothing else is told of this mesh.
        mesh = init_device_mesh(self.args.device.type, (groups, group.size), mesh_dim_names=("dp_replicate", "tp"))
        state = self.accelerator.state
        before, state.device_mesh = state.device_mesh, mesh
        try:
            loader = super().get_train_dataloader()
        finally:
            state.device_mesh = before
        if isinstance(loader, DataLoaderDispatcher) and groups > 1:
            raise ConfigError(
                "accelerate would send the same batches to all groups of ranks: for a dataset without a length, set "
                "accelerator_config={'dispatch_batches': False}"
            )
        return loader
