from dataclasses import replace

import bench_model
import plans
import pytest
import study_accuracy

from lemo_fx import Elimination, LemoConfig


@pytest.mark.parametrize("tool", [bench_model, study_accuracy])
def test_the_presets_are_what_the_tools_measure(tool):
    sites = {
        "careful": "step-0.4375-slope-0.5",
        "balanced": "step-0.5-slope-0.6-both-float8",
        "fast": "step-0.375-slope-0.6-both-float8",
    }
    for preset, name in sites.items():
        found = plans.named(name)
        # The tools say what the default leaves to "auto".
        assert {site.score for site in (found.attention, found.mlp)} == {"step"}
        site = replace(LemoConfig.preset(preset).mlp, score="step")
        assert found == LemoConfig.preset(preset, attention=site, mlp=site)
        assert any(picked.removesuffix("-checkpointed") == name for picked in tool.PICKED)


def test_words_come_in_any_order():
    plan = plans.named("skip-0.25-offload-block-16-shared-balanced-slope--0.1-last-two", "predicted")
    assert plan == plans.named("skip-0.25-slope--0.1-balanced-last-two-shared-block-16-offload", "predicted")
    site = Elimination(keep=0.25, score="predicted", balance=True, slope=-0.1)
    assert plan.attention == site
    assert (plan.mlp.score, plan.block_size, plan.offload, plan.dense_layers) == ("shared", 16, True, (0, -2, -1))
    assert plans.named("exact-0.25-both-float8").float8_everywhere
    assert plans.named("lora-float8") == LemoConfig(None, None, forward="float8")
    every = plans.named("step-0.25-every-key-both-float8")
    assert (every.attention.keys, every.mlp.keys, every.float8_everywhere) == ("every", "kept", True)


def test_variants_of_the_benchmark():
    named = bench_model.Variant.named
    assert named("lora-eager").config is None
    assert named("lora-liger-checkpointed").config is None
    lora = named("lora-eager-checkpointed")
    assert (lora.config, lora.compiled, lora.checkpointed) == (LemoConfig(None, None), False, True)
    assert named("longlora-checkpointed").attention == "shifted_sparse"
    assert named("skip-0.5-graphs").mode == "reduce-overhead"
    assert named("skip-0.5").config.mlp.score == "predicted"
    # Which says nothing without checkpointing.
    assert named("skip-0.5-shared-elementwise").checkpointed
    assert not named("step-0.5").checkpointed


@pytest.mark.parametrize(
    "name", ["", "skip", "skip-0.5x", "step-0.5-fast", "exact-0.5-slope", "lora-random", "lora-every-key", "step-."]
)
def test_a_name_that_says_nothing(name):
    with pytest.raises(ValueError, match=repr(name)):
        plans.named(name)
    with pytest.raises(ValueError, match=repr(name)):
        study_accuracy.plan_named(name)


def test_a_name_that_says_something_twice():
    with pytest.raises(ValueError, match="says forward twice"):
        plans.named("step-0.5-float8-both-float8")
