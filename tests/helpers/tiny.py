"""Tiny random models, batches and the one table of tolerances that the tests share."""

import torch
import transformers
from peft import LoraConfig, get_peft_model
from tolerance import TOLERANCE
from torch.utils._python_dispatch import TorchDispatchMode

from lemo_fx.kernels.block_scores import reference as scores_reference
from lemo_fx.kernels.segmented_cross_entropy import reference as loss_reference

VOCABULARY = 97

LLAMA_LIKE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
MODELS = {
    "llama": (transformers.LlamaForCausalLM, LLAMA_LIKE),
    "qwen3": (transformers.Qwen3ForCausalLM, LLAMA_LIKE | {"head_dim": 8}),
    "mistral": (transformers.MistralForCausalLM, LLAMA_LIKE | {"sliding_window": 24}),
    "gemma3": (transformers.Gemma3ForCausalLM, LLAMA_LIKE | {"head_dim": 8, "sliding_window": 24}),
    "gemma2": (transformers.Gemma2ForCausalLM, LLAMA_LIKE | {"head_dim": 8, "sliding_window": 24}),
    "phi3": (transformers.Phi3ForCausalLM, LLAMA_LIKE | {"pad_token_id": 0}),
    "phi": (transformers.PhiForCausalLM, LLAMA_LIKE),
    "opt": (
        transformers.OPTForCausalLM,
        {"hidden_size": 32, "ffn_dim": 64, "num_attention_heads": 4, "word_embed_proj_dim": 32, "dropout": 0.0}
        | {"max_position_embeddings": 512},
    ),
    "gpt_neox": (
        transformers.GPTNeoXForCausalLM,
        {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "max_position_embeddings": 512},
    ),
    "gpt2": (
        transformers.GPT2LMHeadModel,
        {"n_embd": 32, "n_head": 4, "n_positions": 512, "resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0},
    ),
    "mixtral": (transformers.MixtralForCausalLM, LLAMA_LIKE | {"num_local_experts": 4, "num_experts_per_tok": 2}),
}
MODELS["opt_post_norm"] = (MODELS["opt"][0], MODELS["opt"][1] | {"do_layer_norm_before": False})
MODELS["gpt_neox_sequential"] = (MODELS["gpt_neox"][0], MODELS["gpt_neox"][1] | {"use_parallel_residual": False})
ARCHITECTURES = tuple(MODELS)


NO_SDPA = ("gemma2",)


def tiny(architecture: str, layers: int = 2, attention: str | None = None, seed: int = 0, **settings):
    """A random float32 model of a few thousand parameters, in train mode; sdpa where the architecture has it."""
    model_class, sizes = MODELS[architecture]
    attention = attention or ("eager" if architecture in NO_SDPA else "sdpa")
    sizes = sizes | {"vocab_size": VOCABULARY, "attn_implementation": attention}
    sizes["n_layer" if architecture == "gpt2" else "num_hidden_layers"] = layers
    if architecture == "gemma3":
        sizes["layer_types"] = (["sliding_attention", "full_attention"] * layers)[:layers]
    torch.manual_seed(seed)
    model = model_class(model_class.config_class(**(sizes | settings)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Biases start at 0 and norms at 1: make every parameter matter.
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
            elif "embed" not in name:
                parameter.mul_(5)
    return model.train()


def with_lora(
    model, dropout: float = 0.0, targets="all-linear", init: bool = False, task_type: str = "CAUSAL_LM", **settings
):
    """A PEFT model whose adapters do something from the start, unless `init` starts them as PEFT does."""
    torch.manual_seed(1)
    config = LoraConfig(
        r=4, target_modules=targets, lora_dropout=dropout, init_lora_weights=init, task_type=task_type, **settings
    )
    return get_peft_model(model, config).train()


def batch(rows: int = 2, length: int = 48, padding: str | None = None, seed: int = 0) -> dict[str, torch.Tensor]:
    """Token ids and labels; with padding "right", "left" or "both" (one sample each) also an attention mask."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (rows, length), generator=generator)
    labels = ids.clone()
    labels[:, : length // 6] = -100
    if padding is None:
        return {"input_ids": ids, "labels": labels}
    mask = torch.ones_like(ids)
    for row in range(rows):
        side = padding if padding != "both" else ("left", "right")[row % 2]
        missing = 5 + 7 * row
        part = slice(0, missing) if side == "left" else slice(length - missing, None)
        mask[row, part] = 0
    # What a padding token would predict is no label either.
    counted = mask * mask.roll(1, dims=1)
    return {
        "input_ids": ids.masked_fill(mask == 0, 0),
        "labels": labels.masked_fill(counted == 0, -100),
        "attention_mask": mask,
    }


def packed(lengths: list[int], seed: int = 0) -> dict:
    """Documents one after another in one row; position_ids restart at each.

    transformers looks for documents only where there is no cache.
    """
    inputs = batch(1, sum(lengths), seed=seed)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    return {**inputs, "position_ids": positions, "use_cache": False}


def gradients(model) -> dict[str, torch.Tensor]:
    """Every gradient by parameter name."""
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def step(model, inputs, scale: float = 1.0):
    """One forward and backward from clean gradients: (loss, gradients)."""
    model.zero_grad(set_to_none=True)
    loss = model(**inputs).loss
    (loss * scale).backward()
    return loss.detach().clone(), gradients(model)


def saved_bytes(model, inputs) -> int:
    """Bytes that one forward saves for its backward: each storage once, parameters not counted."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    held: dict[int, torch.Tensor] = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: [t, held.setdefault(t.untyped_storage().data_ptr(), t)][0], lambda t: t
    ):
        model(**inputs)
    return sum(t.untyped_storage().nbytes() for at, t in held.items() if at not in weights)


def assert_same_step(one, other, tolerance: str) -> None:
    """Losses and every gradient of two `step` results agree."""
    torch.testing.assert_close(one[0], other[0], **TOLERANCE[tolerance])
    assert one[1].keys() == other[1].keys()
    for name, gradient in one[1].items():
        torch.testing.assert_close(
            other[1][name], gradient, **TOLERANCE[tolerance], msg=lambda text, name=name: f"gradient of {name}: {text}"
        )


def selections(model) -> dict[str, torch.nn.Module]:
    """The selecting modules of a transformed model by name."""
    return {name: module for name, module in model.named_modules() if type(module).__name__ == "SelectBlocks"}


def fix_choice(model, blocks):
    """Every site keeps these blocks (of 8 tokens), whatever the scores say."""
    tokens = torch.cat([torch.arange(8 * b, 8 * b + 8) for b in blocks])
    for module in selections(model).values():
        module.register_forward_hook(lambda _, __, out: tokens.expand(out.shape[0], -1).contiguous())


class Recorder:
    """Collects the tokens that every selection of a transformed model returns while it is active."""

    def __init__(self, model) -> None:
        self.model = model
        self.tokens: dict[str, list[torch.Tensor]] = {}

    def __enter__(self):
        self.hooks = [
            module.register_forward_hook(
                lambda _, __, out, name=name: self.tokens.setdefault(name, []).append(out.clone())
            )
            for name, module in selections(self.model).items()
        ]
        return self

    def __exit__(self, *error) -> None:
        for hook in self.hooks:
            hook.remove()


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation returns, also inside lemo_fx's larger ops."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        inside = {
            torch.ops.lemo_fx.block_scores.default: scores_reference.block_scores,
            torch.ops.lemo_fx.segmented_cross_entropy.default: lambda *a: loss_reference.segmented_cross_entropy(
                *a[:7], a[7:]
            ),
        }
        if func in inside:
            # A mode is off while it handles an operation, and would not see what a custom op does.
            with self:
                return inside[func](*args, **(kwargs or {}))
        out = func(*args, **(kwargs or {}))
        for item in out if isinstance(out, tuple | list) else (out,):
            if isinstance(item, torch.Tensor):
                self.numel = max(self.numel, item.numel())
        return out


def anatomy(model):
    """Everything about a model that a failed or reverted transform must leave as it was."""
    return {
        "classes": [(name, type(module)) for name, module in model.named_modules()],
        "keys": list(model.state_dict()),
        "buffers": [name for name, _ in model.named_buffers()],
        "attributes": [(name, sorted(vars(module))) for name, module in model.named_modules()],
        "training": [module.training for module in model.modules()],
    }
