"""Vision-language models with images among their tokens: the text decoder's layers run on kept tokens of both kinds."""

import copy

import pytest
import torch
import transformers
from survey_architectures import BLOCK, EVERYTHING, masked_step, recorded, same, step
from tiny_models import tiny_config

import lemo_fx
from lemo_fx import Elimination, LemoConfig

ROWS, LENGTH, IMAGE, FIRST = 2, 48, 16, 9
"""An image of `IMAGE` tokens stands in each row, from the token `FIRST` + the row's number on."""
HALF = LemoConfig(Elimination(0.5), Elimination(0.5), block_size=BLOCK, dense_layers=())


def qwen(model_type):
    """Images are patches of all samples in one row, and positions have three axes."""
    config = tiny_config(model_type)
    vision = config.vision_config
    vision.patch_size = 4
    if hasattr(vision, "window_size"):
        vision.window_size, vision.fullatt_block_indexes = 16, [1, 3]
    if hasattr(vision, "deepstack_visual_indexes"):
        vision.deepstack_visual_indexes, vision.num_position_embeddings = [0, 2, 4], 64
    side = 2 * int(IMAGE**0.5)
    inputs = {
        "pixel_values": torch.randn(ROWS * side * side, 3 * 2 * 4 * 4),
        "image_grid_thw": torch.tensor([[1, side, side]] * ROWS),
    }
    return config, inputs, "mm_token_type_ids"


def gemma(model_type):
    """An image's tokens attend to each other, later ones too."""
    config = tiny_config(model_type)
    config.vision_config.image_size, config.vision_config.patch_size = 32, 4
    config.mm_tokens_per_image = IMAGE
    return config, {"pixel_values": torch.randn(ROWS, 3, 32, 32)}, "token_type_ids"


def gemma4(model_type):
    """Patches come flat, with their positions; layers have inputs of their own by token ids."""
    config = tiny_config(model_type)
    config.text_config.num_kv_shared_layers = 0
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8, "patch_size": 4}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4}
    config.vision_config = transformers.Gemma4VisionConfig(**sizes, **heads, position_embedding_size=64)
    side = 3 * int(IMAGE**0.5)
    positions = torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing="xy"), -1).flatten(0, 1)
    inputs = {
        "pixel_values": torch.rand(ROWS, side * side, 3 * 4 * 4),
        "image_position_ids": positions.expand(ROWS, -1, -1),
    }
    return config, inputs, "mm_token_type_ids"


MODELS = {
    "qwen2_vl": qwen,
    "qwen2_5_vl": qwen,
    "qwen3_vl": qwen,
    "qwen3_5": qwen,
    "glm4v": qwen,
    "glm4v_moe": qwen,
    "gemma3": gemma,
    "gemma4": gemma4,
}

DENSE = {"qwen3_5": {"linear_attn"}, "gemma4": {"mlp_1", "attention"}}
"""Branches that stay dense in some layers, with images or without."""


def with_images(model_type, padded):
    torch.manual_seed(0)
    config, inputs, kinds = MODELS[model_type](model_type)
    model = transformers.AutoModelForImageTextToText.from_config(config).float().train()
    with torch.no_grad():
        for parameter in model.parameters():
            # Some projections of images start at 0.
            parameter.add_(0.05 * torch.randn_like(parameter))
    ids = torch.randint(4, 100, (ROWS, LENGTH))
    mask = torch.ones_like(ids)
    for row in range(ROWS):
        ids[row, FIRST + row : FIRST + row + IMAGE] = config.image_token_id
    if padded:
        mask[1, -11:] = 0
    image = ids == config.image_token_id
    labels = ids.masked_fill(image | (mask == 0), -100)
    inputs |= {"input_ids": ids, "labels": labels, "attention_mask": mask, kinds: image.long()}
    return model, inputs


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("model_type", MODELS)
def test_images_are_kept_and_dropped_like_text(model_type, padded):
    model, inputs = with_images(model_type, padded)
    expected = step(model, inputs)
    pixels = {**inputs, "pixel_values": inputs["pixel_values"] + 1}
    assert step(model, pixels)[0] != expected[0], "the images do nothing"

    lemo_fx.transform(model, HALF)
    report = lemo_fx.report(model)
    assert not [note for note in report.notes if "not proven" in note]
    assert {site.site for site in report.sites if site.eliminated == "dense"} <= DENSE.get(model_type, set())
    assert {"attention", "mlp"} <= {site.site.partition("_")[0] for site in report.sites if site.eliminated == "skip"}
    tokens = {}
    with recorded(model, tokens):
        found = step(model, inputs)
    image = inputs["input_ids"] == model.config.image_token_id
    kept = image.gather(1, tokens[next(iter(tokens))][0])
    assert 0 < int(kept.sum()) < int(image.sum()), "images are kept whole, or not at all"
    original = lemo_fx.revert(copy.deepcopy(model))
    original.set_attn_implementation("eager")
    same("masked original", masked_step(original, model, tokens, inputs), found)

    lemo_fx.transform(lemo_fx.revert(model), EVERYTHING)
    same("keep 1.0", expected, step(model, inputs))
    lemo_fx.transform(lemo_fx.revert(model), LemoConfig(block_size=BLOCK))
    same("exact", expected, step(model, inputs), gradients=False)
