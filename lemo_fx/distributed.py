"""Several processes: which kinds of parallelism are refused by name, and how rewritten classes live with FSDP2's.

Data parallelism leaves a layer whole while it runs, so nothing else here knows of it: DDP only adds up gradients, and
FSDP2 gathers a unit's weights in hooks around its call. Everything that cuts a layer or a sequence into pieces would
show a rewritten layer a part for the whole, but for `lemo_fx.runtime.sequence`, which the layers know of.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from accelerate.state import AcceleratorState
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from lemo_fx.errors import UnsupportedModelError
from lemo_fx.kernels.private import CheckpointWrapper

_MEND = "train with DDP or FSDP2 instead, or without lemo_fx.transform"
_SHARE = "to share sequences between ranks, use lemo_fx.transform(model, sequence_group=...)"


def refuse_wrapped(model: nn.Module) -> None:
    """Raise if decoder layers are hidden in wrappers, so that they can no longer be rewritten in place."""
    for name, module in model.named_modules():
        if isinstance(module, FullyShardedDataParallel | CheckpointWrapper):
            raise UnsupportedModelError(
                f"{name or type(model).__name__} is a {type(module).__name__}: call lemo_fx.transform before wrapping "
                "the model"
            )


def accelerates_parts() -> int:
    """Into how many parts accelerate's `sp_size` cuts sequences; 1 where it does not."""
    settings = AcceleratorState._shared_state.get("parallelism_config")
    return getattr(settings, "sp_size", None) or 1


def refuse_process(model: nn.Module, shared_by: int = 1) -> None:
    """Raise if the process is set up for tensor, context or sequence parallelism, or this is DataParallel's replica.

    Args:
        shared_by: how many ranks share the model's sequences.
    """
    if getattr(model, "_is_replica", False):
        raise UnsupportedModelError(
            "torch.nn.DataParallel runs one model in several threads, which would share one step's labels: start one "
            "process per GPU (torchrun, accelerate launch) for DDP or FSDP2, or show one GPU only"
        )
    settings = AcceleratorState._shared_state.get("parallelism_config")
    if accelerates_parts() not in (1, shared_by):
        raise UnsupportedModelError(
            f"accelerate's ParallelismConfig(sp_size={accelerates_parts()}) cuts sequences into parts, of which the "
            f"rewritten layers have to know: lemo_fx.transform(model, sequence_group=...) with a group of that many "
            "ranks"
        )
    for kind, name, mend in (("tp", "tensor", _MEND), ("cp", "context", _SHARE)):
        if (getattr(settings, f"{kind}_size", None) or 1) > 1:
            raise UnsupportedModelError(
                f"accelerate's ParallelismConfig({kind}_size={getattr(settings, f'{kind}_size')}): {name} parallelism "
                f"is not supported; {mend}"
            )
    if (getattr(functional.scaled_dot_product_attention, "__module__", None) or "").startswith("torch.distributed."):
        raise UnsupportedModelError(
            f"torch's context_parallel is active: context parallelism is not supported; {_SHARE}"
        )


def refuse_cut_weights(model: nn.Module) -> None:
    """Raise if weights are cut into pieces for tensor or sequence parallelism."""
    for name, module in model.named_modules():
        if (getattr(module, "_tp_size", None) or 1) > 1:
            raise UnsupportedModelError(
                f"{type(module).__name__} was loaded with tp_size={module._tp_size}: tensor parallelism is not "
                f"supported; {_MEND}"
            )
        for parameter in module.parameters(recurse=False):
            if isinstance(parameter, DTensor) and not _by_data_parallelism(module, parameter):
                raise UnsupportedModelError(
                    f"{name} holds a DTensor of {parameter.placements}: tensor and sequence parallelism are not "
                    f"supported; {_MEND}"
                )


def _by_data_parallelism(module: nn.Module, parameter: DTensor) -> bool:
    """Whether FSDP2 alone cut this parameter: in one dimension of its mesh, the last (the first replicates in HSDP)."""
    *others, last = parameter.placements
    managed = getattr(module, "_is_fsdp_managed_module", False)
    return managed and last.is_shard() and all(placement.is_replicate() for placement in others)


def refuse_sharded_base(layers: Iterable[nn.Module]) -> None:
    """Raise if the base is to be held in float8, but its weights are cut into shards already."""
    for layer in layers:
        for name, parameter in layer.named_parameters():
            if isinstance(parameter, DTensor):
                raise UnsupportedModelError(
                    f"base='float8' rounds whole weights, but {name} is a shard: use base='model' with FSDP2"
                )


def refuse_finer_units(name: str, layer: nn.Module) -> None:
    """Raise if FSDP2 shards parts of a rewritten layer: a branch may call them any number of times, ranks but once."""
    for inner, module in layer.named_modules():
        if inner and isinstance(module, FSDPModule):
            raise UnsupportedModelError(
                f"{name}.{inner} is an FSDP2 unit of its own inside a rewritten decoder layer: apply fully_shard to "
                "whole decoder layers"
            )


def refuse_collective(model: nn.Module, verb: str) -> None:
    """Raise if a forward pass of the model is a collective, so that a rank that runs it alone would wait for ever."""
    for module in model.modules():
        if isinstance(module, FSDPModule | FullyShardedDataParallel | DistributedDataParallel):
            raise UnsupportedModelError(
                f"{verb} needs the model before it is wrapped by {type(module).__name__}: run it on one rank, save the "
                "result, and load it on all of them"
            )


@contextmanager
def gathered(layer: nn.Module) -> Iterator[None]:
    """A sharded layer's weights whole for the time of a with block; every rank must enter it."""
    if not isinstance(layer, FSDPModule):
        yield
        return
    layer.unshard()
    try:
        yield
    finally:
        layer.reshard()


def call_once(module: nn.Module, function: Callable, *args: Any) -> Any:
    """`function(*args)` in the place of the module's forward: FSDP2's hooks gather its weights for it, once.

    Every call of a sharded module is a collective. What a rank does a number of times that depends on its batch has to
    happen inside one call.
    """
    own = {name: value for name, value in vars(module).items() if name == "forward"}
    vars(module)["forward"] = function
    try:
        return module(*args)
    finally:
        del vars(module)["forward"]
        vars(module).update(own)


_sharded: dict[tuple[type, type], type] = {}


def under_fsdp(top: type, inner: type) -> type | None:
    """FSDP2's class like `top`, but on another inner class; None if `top` is none of FSDP2's."""
    if not issubclass(top, FSDPModule) or len(top.__bases__) != 2:
        return None
    key = (top, inner)
    if key not in _sharded:
        own = {name: value for name, value in vars(top).items() if name == "__deepcopy__"}
        _sharded[key] = type(top.__name__, (top.__bases__[0], inner), own)
    return _sharded[key]
