"""`float8_linear` on the GPU's float8 products, its gradient, and the switch that puts it in frozen layers' place.

Plain torch rather than a custom op: a compiler fuses the rounding of x into what comes before it.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn

from lemo_fx.errors import UnsupportedModelError
from lemo_fx.kernels.float8_linear import as_it_comes, four_bits, held, reference
from lemo_fx.kernels.float8_linear.matmul import scaled_matmul
from lemo_fx.kernels.private import writable


def float8_linear(x: torch.Tensor, weight: torch.Tensor, again: bool = False) -> torch.Tensor:
    """x [..., K] @ weight [N, K].T -> [..., N] in x's dtype; no gradient.

    Args:
        again: as in `reference.quantise`, of the weight.
    """
    out = scaled_matmul(*reference.quantise(x.flatten(0, -2)), *reference.quantise(weight, again))
    return out.to(x.dtype).unflatten(0, x.shape[:-1])


class Float8Linear(torch.autograd.Function):
    """`float8_linear` whose gradient for x is a product in float8 too; the weight is frozen, and all that is saved."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """As `float8_linear`."""
        ctx.save_for_backward(weight)
        return float8_linear(x, weight, again=True)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Gradient [..., N] @ weight [N, K] -> [..., K], both rounded to float8."""
        (weight,) = ctx.saved_tensors
        return float8_linear(grad, weight.t()), None


class FourBitsLinear(torch.autograd.Function):
    """`Float8Linear` of a weight in 4 bits, which is unpacked for as long as a product takes."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, *packed: Any) -> torch.Tensor:
        """As `float8_linear`.

        Args:
            packed: the fields of `four_bits.Packed`.
        """
        ctx.save_for_backward(*packed[: four_bits.TENSORS])
        ctx.settings = packed[four_bits.TENSORS :]
        return float8_linear(x, four_bits.unpack(*packed, turn=1))

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """As of `Float8Linear`."""
        weight = four_bits.unpack(*ctx.saved_tensors, *ctx.settings, turn=2)
        return float8_linear(grad, weight.t()), *(None for _ in four_bits.Packed._fields)


@torch.compiler.assume_constant_result
def has_float8(device: torch.device) -> bool:
    """Whether the device multiplies float8 (NVIDIA: compute capability 8.9 and up); the CPU rounds as if it did."""
    return device.type == "cpu" or (device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9))


def fits(x: torch.Tensor, layer: nn.Linear) -> bool:
    """Whether a linear layer is one of those: frozen, in half precision on a GPU, sides that float8 products take."""
    half = x.dtype is torch.bfloat16 or is_half(layer)
    return half and _takes_float8(layer) and has_float8(x.device)


def is_half(layer: nn.Linear) -> bool:
    """Whether a layer computes in bfloat16, whatever it is handed; on the CPU, which rounds only, float32 does too."""
    return layer.weight.device.type == "cpu" or dtype_of(layer) is torch.bfloat16


def _takes_float8(layer: nn.Linear, frozen: bool = True) -> bool:
    weight = layer.weight
    if as_it_comes.is_packed(weight) and as_it_comes.read(layer) is None:
        return False
    if four_bits.is_four_bits(layer) and not _four_bits_take_float8(layer):
        return False
    return not (frozen and weight.requires_grad) and layer.in_features % 16 == layer.out_features % 16 == 0


def _four_bits_take_float8(layer: Any) -> bool:
    """Whether a layer in 4 bits can be read, and on a GPU does not ask to be computed in another dtype."""
    half = not layer.weight.is_cuda or layer.compute_dtype in (None, torch.bfloat16)
    return half and four_bits.read(layer, torch.bfloat16) is not None


def dtype_of(layer: nn.Linear) -> torch.dtype:
    """Of the weight, or of what it was before it was held in float8; checkpoints in float8 are of bfloat16 models.

    Of a weight in 4 bits the one that it is computed in, which is its input's where it does not say.
    """
    if four_bits.is_four_bits(layer):
        return cast(Any, layer).compute_dtype or torch.float32
    dtype = vars(layer).get(DTYPE, layer.weight.dtype)
    return torch.bfloat16 if dtype.itemsize == 1 else dtype


def _is_float32_adapter(x: torch.Tensor, weight: torch.Tensor) -> bool:
    return weight.requires_grad and x.dtype is weight.dtype is torch.float32 and has_float8(x.device)


def _known_linears(module: nn.Module) -> tuple[nn.Linear, ...]:
    """Those of torch's own class, or whose weight in float8 or 4 bits can be read: others compute in their own way."""
    return tuple(
        layer
        for layer in module.modules()
        if isinstance(layer, nn.Linear)
        and (type(layer) is nn.Linear or isinstance(layer, SwitchedLinear) or _can_be_read(layer))
    )


def _can_be_read(layer: nn.Linear) -> bool:
    if type(layer).__name__ == as_it_comes.FINEGRAINED:
        return as_it_comes.read(layer) is not None
    return four_bits.read(layer, torch.bfloat16) is not None


def float8_layers(module: nn.Module, frozen: bool = True) -> list[nn.Linear]:
    """The layers that a switch on the module would change, on a device that multiplies float8.

    Args:
        frozen: as the layers are now; else as they will be once they are frozen (under adapters that come later).
    """
    return [layer for layer in _known_linears(module) if _takes_float8(layer, frozen)]


def held_layers(module: nn.Module) -> list[HeldLinear]:
    """The layers whose weights a switch holds in float8."""
    return [layer for layer in module.modules() if isinstance(layer, HeldLinear)]


def layers_in_float8(module: nn.Module) -> list[nn.Linear]:
    """The layers whose weights came in float8, and are used as they are."""
    return [layer for layer in _known_linears(module) if as_it_comes.read(layer) is not None]


def layers_in_four_bits(module: nn.Module) -> list[nn.Linear]:
    """The layers in bitsandbytes' 4 bits that a switch on the module lets compute in float8."""
    return [layer for layer in _known_linears(module) if four_bits.is_four_bits(layer) and _takes_float8(layer)]


def has_packed_layers(module: nn.Module) -> bool:
    """Whether a switch on the module saves de-quantised weights, on or off."""
    return any(as_it_comes.unpacks(layer.weight) for layer in _known_linears(module))


class Float8Switch(nn.Module):
    """Lets a module's frozen linear layers compute in float8 for the time of a call.

    Float32 adapters of a bfloat16 model multiply in bfloat16 then, as under autocast: a float32 product costs more than
    all that float8 leaves of the layer around it. Everything else computes as always.

    Not a mode of torch's: within a checkpoint, a compiler does not see those.
    """

    on = False
    holding = False
    in_bfloat16 = False
    module: tuple[nn.Module, ...] = ()
    layers: tuple[nn.Linear, ...] = ()
    children_seen: tuple[tuple[nn.Module, tuple], ...] = ()

    def connect(self, module: nn.Module) -> None:
        """Put every plain linear layer of `module` under this switch."""
        # In tuples, so that weights are not listed twice.
        self.module, self.children_seen = (module,), ()
        self.refresh()

    def refresh(self, check: Callable[[nn.Module], None] | None = None) -> None:
        """The same for layers that the module was given since: adapters. Called in every step, so it looks first.

        Args:
            check: called with the module where it was given some and weights are held, before any more are.
        """
        if self.children_seen and all(tuple(m._modules.values()) == seen for m, seen in self.children_seen):
            return
        if check is not None and self.holding:
            check(self.module[0])
        self.children_seen = tuple((m, tuple(m._modules.values())) for m in self.module[0].modules())
        self.layers = _known_linears(self.module[0])
        for layer in self.layers:
            if not isinstance(layer, SwitchedLinear):
                vars(layer)[SWITCH] = self
                layer.__class__ = _switched(type(layer))  # type: ignore[arg-type]
        self.in_bfloat16 = any(
            dtype_of(layer) is torch.bfloat16 and _takes_float8(layer, frozen=False) for layer in self.layers
        )
        if self.holding:
            self.hold()

    def hold(self) -> None:
        """Hold the weights of frozen layers in float8 from now on, of those that freeze later too; frees the others."""
        self.holding = True
        for layer in self.layers:
            # A weight of another class is sharded, or quantised already.
            plain = type(layer) is SwitchedLinear and type(layer.weight) is nn.Parameter
            if plain and layer.weight.itemsize > 1 and _takes_float8(layer):
                vars(layer)[DTYPE] = layer.weight.dtype
                # The parameter stays the object that others may know.
                layer.weight.data = held.pack(layer.weight)
                layer.__class__ = HeldLinear

    def disconnect(self) -> None:
        """Give the layers their class back, and weights that were held in float8 their dtype, rounded as they are."""
        self.holding = False
        for layer in self.layers:
            if type(layer) is HeldLinear:
                layer.weight.data = layer.dequantised()
                layer.__class__ = SwitchedLinear  # type: ignore[assignment]
                del vars(layer)[DTYPE]
            vars(layer).pop(SWITCH, None)
            if isinstance(layer, SwitchedLinear):
                layer.__class__ = layer.original  # type: ignore[assignment]

    def run(self, function: Callable, *args: Any, **kwargs: Any) -> Any:
        """`function(*args, **kwargs)` in float8."""
        self.on = True
        try:
            return function(*args, **kwargs)
        finally:
            self.on = False


SWITCH = "_lemo_fx_float8"
DTYPE = "_lemo_fx_dtype"
"""Attribute of a layer whose weight is held in float8: the dtype that it had."""


class SwitchedLinear(nn.Linear):
    """A linear layer under a `Float8Switch`.

    Attributes:
        original: the class that it has without.
    """

    original: type[nn.Linear] = nn.Linear

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., K] -> [..., N]."""
        switch = vars(self)[SWITCH]
        if switch.on and fits(x, self):
            came, packed = as_it_comes.read(self), four_bits.read(self, x.dtype)
            if came is not None:
                out = as_it_comes.float8_product(x, came)
            elif packed is not None:
                grad = torch.is_grad_enabled()
                out = FourBitsLinear.apply(x, *packed) if grad else float8_linear(x, four_bits.unpack(*packed))
            else:
                run = Float8Linear.apply if torch.is_grad_enabled() else float8_linear
                out = run(x, self.weight)
            return self._with_bias(out)
        if as_it_comes.unpacks(self.weight) and not self.weight.requires_grad:
            return self._with_bias(as_it_comes.PackedProduct.apply(x, self.weight))
        if switch.on and switch.in_bfloat16 and _is_float32_adapter(x, self.weight):
            bias = None if self.bias is None else self.bias.bfloat16()
            return F.linear(x.bfloat16(), self.weight.bfloat16(), bias).to(x.dtype)
        return super().forward(x)

    def _with_bias(self, out: torch.Tensor) -> torch.Tensor:
        """Added outside of the matmul's gradient: a bias may be trained where the weight is frozen."""
        # Some adapters add to the output in place.
        return writable(out) if self.bias is None else out + self.bias.to(out.dtype)

    def _apply(self, fn: Callable, recurse: bool = True) -> SwitchedLinear:
        """As always (`half()`, `to()`); the switch looks at its layers' dtypes anew before the next step."""
        super()._apply(fn, recurse)
        vars(self)[SWITCH].children_seen = ()
        return self

    def __reduce_ex__(self, protocol: Any) -> tuple:
        """Copied and pickled as the linear layer it is without a switch."""
        state = {name: value for name, value in vars(self).items() if name != SWITCH}
        return object.__new__, (self.original,), state


@functools.cache
def _switched(kind: type[nn.Linear]) -> type[SwitchedLinear]:
    """`SwitchedLinear` of another class of linear layers, which bears its name."""
    if kind is nn.Linear:
        return SwitchedLinear
    namespace = {"original": kind, "__module__": kind.__module__, "__qualname__": kind.__qualname__}
    return type(kind.__name__, (SwitchedLinear, kind), namespace)


class HeldLinear(SwitchedLinear):
    """One whose weight is held in float8, see `held`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., K] -> [..., N]: in float8 where the switch is on, else with the weight de-quantised."""
        if self.weight.dtype is not torch.uint8:
            raise UnsupportedModelError(
                f"the base is held in float8 (base='float8'), but its bytes were cast to {self.weight.dtype}: leave "
                "them out of mixed precision policies, or transform with base='model'"
            )
        if vars(self)[SWITCH].on and fits(x, self):
            out = held.Float8Product.apply(x, self.weight, self.in_features)
        else:
            out = held.DequantisedProduct.apply(x, self.weight, self.in_features, dtype_of(self))
        return self._with_bias(out)

    def _apply(self, fn: Callable, recurse: bool = True) -> SwitchedLinear:
        """A cast of the model leaves the bytes alone, and is one of what they are de-quantised to."""
        vars(self)[DTYPE] = fn(self.weight.new_empty(0, dtype=vars(self)[DTYPE])).dtype
        return super()._apply(fn, recurse)

    def dequantised(self) -> torch.Tensor:
        """The weight [N, K] in the dtype that it had."""
        return held.dequantise(self.weight.detach(), self.in_features, dtype_of(self))

    def __reduce_ex__(self, protocol: Any) -> tuple:
        """Copied and pickled as the linear layer that it would be without a switch."""
        make, arguments, state = super().__reduce_ex__(protocol)
        del state[DTYPE]
        weight = nn.Parameter(self.dequantised(), requires_grad=False)
        return make, arguments, {**state, "_parameters": {**self._parameters, "weight": weight}}


for name, kind in itertools.product(("__name__", "__qualname__", "__module__"), (SwitchedLinear, HeldLinear)):
    setattr(kind, name, getattr(nn.Linear, name))
