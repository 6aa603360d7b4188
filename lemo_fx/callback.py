"""For the transformers Trainer: callbacks that log and that finish densely, and one whose ranks share sequences."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from accelerate.data_loader import DataLoaderDispatcher
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments

from lemo_fx.api import labels, report, set_dense, shared_by
from lemo_fx.config import is_count, is_number
from lemo_fx.distributed import accelerates_parts
from lemo_fx.errors import ConfigError
from lemo_fx.measure import peak_memory
from lemo_fx.runtime.parts import SequenceGroup


class LemoCallback(TrainerCallback):
    """Adds to every training log what the rewritten layers did, so that all of the Trainer's reporters get it.

    `trainer.add_callback(LemoCallback(trainer))`. The entries are "lemo/kept_attention" and "lemo/kept_mlp" (share of
    the tokens that the last step kept, mean over the layers, dense ones not counted), "lemo/peak_memory_gib" (of the
    model's accelerator since its statistics were last reset; of the process where the model is on the CPU) and, where
    predictors choose blocks, "lemo/recall_attention" and "lemo/recall_mlp".

    It also tells the layers the labels that the Trainer takes out of a batch for `compute_loss_func` or label
    smoothing, see `lemo_fx.labels`.

    Nothing is carried from step to step but a recall that waits for the next log, so a resumed run logs what an
    uninterrupted one does.

    Args:
        trainer: its reporters come before added callbacks, so this one moves itself to the front of its list.
        recall_every: every so many optimizer steps, how many of the blocks that the measured scores would keep the
            predictors keep, on the step's last batch; costs a forward and a capture of the layers. None: never.
    """

    def __init__(self, trainer: Trainer, recall_every: int | None = None) -> None:
        if recall_every is not None and not is_count(recall_every):
            raise ConfigError(f"recall_every={recall_every!r} must be a number of steps, or None for never")
        if not hasattr(trainer, "callback_handler"):
            raise ConfigError(f"LemoCallback takes the trainer that it is added to, not {type(trainer).__name__}")
        self.trainer = trainer
        self.recall_every = recall_every
        self._batch: dict[str, Any] | None = None
        self._hook: Any = None
        self._recall: dict[str, float] = {}
        self._told: Callable | None = None
        self._own_loss: Callable | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Go before the reporters, around the loss; raise NotTransformedError where there is nothing to log."""
        report(kwargs["model"])
        callbacks = self.trainer.callback_handler.callbacks
        callbacks.remove(self)
        callbacks.insert(0, self)
        if self._told is None:
            # On the instance: a subclass's own method may be under it.
            self._own_loss = vars(self.trainer).get("compute_loss")
            self._told = vars(self.trainer)["compute_loss"] = self._telling(self.trainer.compute_loss)

    def _telling(self, compute_loss: Callable) -> Callable:
        @functools.wraps(compute_loss)
        def told(model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            found, ids = inputs.get("labels"), inputs.get("input_ids")
            of_tokens = isinstance(found, torch.Tensor) and isinstance(ids, torch.Tensor) and found.shape == ids.shape
            assert self.trainer.model is not None
            with labels(self.trainer.model, found if of_tokens else None):
                return compute_loss(model, inputs, *args, **kwargs)

        return told

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Watch for the batch of a step whose recall is wanted."""
        if self.recall_every and (state.global_step + 1) % self.recall_every == 0:
            self._forget()  # of a step that never ended (auto_find_batch_size)
            self._hook = kwargs["model"].register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._batch = kwargs

    def _forget(self) -> None:
        if self._hook is not None:
            self._hook.remove()
        self._hook = self._batch = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure the recall on the batch that was watched for."""
        batch = self._batch
        self._forget()
        if batch is not None:
            recalls = report(kwargs["model"], recall_on=batch).means("recall")
            self._recall = {f"lemo/recall_{kind}": recall for kind, recall in recalls.items()}

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Add to a training log; those of evaluations and of the whole run are left alone."""
        model, logs = kwargs["model"], kwargs["logs"]
        if "loss" not in logs:
            return
        peak = peak_memory(next(model.parameters()).device) / 2**30
        entries = {**_kept_shares(model), "lemo/peak_memory_gib": peak, **self._recall}
        self._recall = {}
        # The history got a copy before the callbacks were asked.
        for target in (logs, state.log_history[-1]):
            target.update(entries)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave nothing behind."""
        self._forget()
        if vars(self.trainer).get("compute_loss") is self._told is not None:
            del vars(self.trainer)["compute_loss"]
            if self._own_loss is not None:
                vars(self.trainer)["compute_loss"] = self._own_loss
        self._told = None


def _kept_shares(model: nn.Module) -> dict[str, float]:
    done = report(model)
    shares = done.means("kept_share")
    if done.dense:
        shares = {site.kind: 1.0 for site in done.sites if site.eliminated != "dense"}
    return {f"lemo/kept_{kind}": share for kind, share in shares.items()}


class DenseFinish(TrainerCallback):
    """Trains the last steps densely: `Trainer(..., callbacks=[DenseFinish(0.15)])`.

    The step's number decides, so a resumed run switches where an uninterrupted one does. In a plain loop, call
    `lemo_fx.set_dense(model, step >= (1 - share) * steps)` before each step.

    Args:
        share: of the optimizer steps that are dense, in [0, 1]; rounded to whole steps.
    """

    def __init__(self, share: float) -> None:
        if not (is_number(share) and 0 <= share <= 1):
            raise ConfigError(f"share={share!r} must be in [0, 1]: the share of the steps that are dense")
        self.share = share

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Raises what the dense steps would, before the first one."""
        set_dense(kwargs["model"], self.share > 0)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Dense or sparse, by the number of the step."""
        set_dense(kwargs["model"], state.global_step >= state.max_steps - round(self.share * state.max_steps))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The model leaves training as it entered it."""
        set_dense(kwargs["model"], False)


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
        assert self.model is not None
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
