"""Bases that come quantised, made of a tiny model's weights: by name, what makes its decoder layers' linears so."""

import importlib

import pytest
import torch
import transformers
from torch import nn

BLOCK = 16


def linears(model):
    """The base's linear layers in decoder layers, by name; under adapters or not."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and ".layers." in f".{name}" and "lora_" not in name
    }


def torchao(make_config):
    """Weights as torchao's `quantize_` leaves them."""

    def quantise(model):
        quantization = pytest.importorskip("torchao.quantization")
        quantization.quantize_(model.get_decoder().layers, make_config(quantization))
        return model

    return quantise


def torchao_float8(granularity, activations=False):
    """Float8 weights with a scale per "PerRow" or "PerTensor"; `activations` are rounded too, as on a GPU."""

    def quantise(model):
        quantization = pytest.importorskip("torchao.quantization")
        from torchao.float8.inference import Float8MMConfig
        from torchao.quantization.quantize_.workflows.float8 import float8_tensor

        scales = getattr(quantization, granularity)()
        product = Float8MMConfig(use_fast_accum=True)
        rounding = float8_tensor.QuantizeTensorToFloat8Kwargs(granularity=scales, mm_config=product)
        for layer in linears(model).values():
            weight = float8_tensor.Float8Tensor.from_hp(
                layer.weight.detach(),
                granularity=scales,
                mm_config=product,
                act_quant_kwargs=rounding if activations else None,
            )
            layer.weight = nn.Parameter(weight, requires_grad=False)
        return model

    return quantise


def in_blocks(weight, block):
    """float8 [N, K] and float32 scales [N / block, K / block] (rounded up)."""
    rows, columns = (-(-size // block) for size in weight.shape)
    padded = weight.new_zeros(rows * block, columns * block, dtype=torch.float32)
    padded[: weight.shape[0], : weight.shape[1]] = weight
    blocks = padded.view(rows, block, columns, block)
    scale = blocks.abs().amax((1, 3)) / 448
    rounded = (blocks / scale.clamp_min(1e-30)[:, None, :, None]).view(padded.shape)
    return rounded[: weight.shape[0], : weight.shape[1]].to(torch.float8_e4m3fn).contiguous(), scale


def finegrained(model, block=BLOCK):
    """Transformers' `FP8Linear`, as `FineGrainedFP8Config` checkpoints have it (with blocks of 128)."""
    from transformers.integrations.finegrained_fp8 import FP8Linear

    for name, layer in linears(model).items():
        made = FP8Linear(layer.in_features, layer.out_features, (block, block), has_bias=layer.bias is not None)
        weight, scale = in_blocks(layer.weight.detach(), block)
        made.weight = nn.Parameter(weight.to(layer.weight.device), requires_grad=False)
        made.weight_scale_inv = nn.Parameter(scale.to(layer.weight.device), requires_grad=False)
        made.bias = layer.bias
        model.set_submodule(name, made)
    return model


def out_of_blocks(weight, scale, block):
    """float32 [N, K] of what `in_blocks` made."""
    along = scale.float().repeat_interleave(block, 0).repeat_interleave(block, 1)
    return weight.float() * along[: weight.shape[0], : weight.shape[1]]


def finegrained_product(
    input, weight, weight_scale_inv, block_size, bias=None, activation_scale=None, allow_deepgemm=True
):
    """In the place of the Triton kernel that `FP8Linear` calls, which is downloaded and needs a GPU."""
    return nn.functional.linear(input, out_of_blocks(weight, weight_scale_inv, block_size[0]).to(input.dtype), bias)


def dequantised(model):
    """The same model with plain weights of the same values."""
    for name, layer in linears(model).items():
        dtype = model.dtype
        if hasattr(layer, "weight_scale_inv"):
            weight = out_of_blocks(layer.weight, layer.weight_scale_inv, layer.block_size[0])
        elif hasattr(layer.weight, "quant_state"):
            functional = importlib.import_module("bitsandbytes.functional")
            weight, dtype = functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state), layer.compute_dtype
        else:
            weight = layer.weight.dequantize()
        plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
        plain.weight, plain.bias = nn.Parameter(weight.to(dtype), requires_grad=False), layer.bias
        model.set_submodule(name, plain)
    return model


def peak(step, model):
    """Bytes on the GPU that `step(model)` takes over those that are there before."""
    step(model)
    model.zero_grad(set_to_none=True)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step(model)
    return torch.cuda.max_memory_allocated() - before


def four_bits(model, folder, compute=torch.bfloat16, nested=True, **settings):
    """The model saved to a folder and loaded in bitsandbytes' NF4, as QLoRA has it."""
    pytest.importorskip("bitsandbytes")
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=nested,
        bnb_4bit_compute_dtype=compute,
    )
    model.save_pretrained(folder)
    return type(model).from_pretrained(folder, quantization_config=config, **settings)


BASES = {
    "torchao_float8_rows": torchao(lambda q: q.Float8WeightOnlyConfig()),
    "torchao_float8_tensor": torchao_float8("PerTensor"),
    "torchao_int8": torchao(lambda q: q.Int8WeightOnlyConfig()),
    "torchao_int4": torchao(lambda q: q.IntxWeightOnlyConfig(torch.int4)),
    "finegrained": finegrained,
}
UNTRAINABLE = {
    "torchao_float8_activations": torchao_float8("PerRow", activations=True),
    "torchao_float8_activations_tensor": torchao_float8("PerTensor", activations=True),
    "torchao_int8_activations": torchao(lambda q: q.Int8DynamicActivationInt8WeightConfig()),
}
"""Those whose product has no gradient, or a wrong one: adapters below are trained wrongly by PEFT too."""
