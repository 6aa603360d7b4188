"""Hundreds of random plans, valid and invalid: the result is right, or it is a LemoError and the model is untouched."""

import random
from dataclasses import replace

import torch
from tiny import TOLERANCE, anatomy, assert_same_step, batch, packed, step, tiny, with_lora

import lemo_fx
from lemo_fx import Elimination, LemoConfig, LemoError, Predictors

MODELS = {
    "llama": lambda: tiny("llama"),
    "llama_lora": lambda: with_lora(tiny("llama")),
    "gpt_neox": lambda: tiny("gpt_neox"),
    "opt": lambda: tiny("opt"),
    "gemma3": lambda: tiny("gemma3", 3),
}
BATCHES = [batch(2, 40), batch(2, 37, padding="both"), packed([14, 9, 20]), batch(1, 5)]


WRONG = 0.04
"""Share of the values that are out of range or of another type: ten such make two plans of five invalid."""


def mostly(draw, right, wrong):
    return draw.choice(wrong if draw.random() < WRONG else right)


def random_site(draw):
    """An Elimination, or what may stand in its place."""
    if draw.random() < 0.1:
        return mostly(draw, [None], [0.5, "skip"])
    if draw.random() < 0.2:
        budget = {"threshold": mostly(draw, [0.0, 0.5, 3, -1e30, 1e30], ["low", float("nan"), float("inf"), [1.0]])}
    else:
        wrong = [0, -1, 1.5, float("nan"), float("inf"), True, "half", [], [0.5], (0.5, 2)]
        budget = {"keep": mostly(draw, [0.1, 0.3, 0.5, 0.77, 1, 1e-9, 1.0, 1.0, 1.0], wrong)}
    return Elimination(
        **budget,
        eliminated=mostly(draw, ["skip", "exact"], ["stand_in", "drop", None]),
        score=mostly(draw, ["auto", "measured", "random", "step"], ["predicted", "shared", "best", 3]),
        balance="keep" in budget and draw.random() < 0.3,
        slope=mostly(draw, [0.0, 0.2, -0.1], [1.5, "up", None]) if budget.get("keep") in (0.3, 0.5, 0.77) else 0.0,
    )


def random_config(draw):
    attention = random_site(draw)
    mlp = random_site(draw)
    if draw.random() < 0.2 and isinstance(attention, Elimination):
        mlp = replace(attention, score="shared")
    return LemoConfig(
        attention,
        mlp,
        block_size=mostly(draw, [1, 3, 8, 8, 16, 64], [0, 1000, 2.5, "8"]),
        dense_layers=mostly(draw, [(), (), None, (0,), [1], (-1,)], [(9,), "all", (0.5,), 3]),
        loss_segments=mostly(draw, ["auto", None, 1, 3, 1000], [0, -2, "some", 1.5]),
        recompute=mostly(draw, ["all", "projections", "elementwise"], ["none"]),
        offload=mostly(draw, [False, True], ["yes"]),
        forward=mostly(draw, ["model", "float8"], ["int4"]),
        backward=mostly(draw, ["model", "float8"], ["int4"]),
        active=mostly(draw, ["training", "always"], ["never"]),
    )


def sites(plan):
    return plan.attention, plan.mlp


def rounds(plan: LemoConfig) -> bool:
    """Whether the forward may be in float8."""
    return "float8" in (plan.forward, plan.backward)


def keeps_everything(plan):
    return all(s is None or (s.keep == 1 and not s.slope) for s in sites(plan)) and not plan.float8_everywhere


def test_random_configs(request):
    trials = 500 if request.config.getoption("--all-cases") else 80
    models = {name: make() for name, make in MODELS.items()}
    for model in models.values():
        # Leaves attributes behind.
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.gradient_checkpointing_disable()
    before = {name: anatomy(model) for name, model in models.items()}
    dense = {name: [step(model, inputs) for inputs in BATCHES] for name, model in models.items()}
    given = {
        name: [None, None, None, Predictors.random(model, LemoConfig(block_size=8, dense_layers=()))]
        for name, model in models.items()
    }
    given["opt"].append(given["llama"][-1])
    counts = {"refused": 0, "right": 0, "equal": 0}
    for number in range(trials):
        draw = random.Random(number)
        name, which = draw.choice(list(models)), draw.randrange(len(BATCHES))
        model, inputs = models[name], BATCHES[which]
        plan = None
        try:
            try:
                plan = random_config(draw)
                lemo_fx.transform(model, plan, predictors=draw.choice(given[name]))
            except LemoError:
                counts["refused"] += 1
            else:
                if draw.random() < 0.3:
                    model.gradient_checkpointing_enable({"use_reentrant": False})
                found = step(model, inputs)
                model.gradient_checkpointing_disable()
                assert found[0].isfinite()
                assert found[1].keys() == dense[name][which][1].keys()
                assert all(g.isfinite().all() for g in found[1].values())
                if keeps_everything(plan):
                    counts["equal"] += 1
                    assert_same_step(found, dense[name][which], "fp32")
                elif not rounds(plan) and all(s is None or s.eliminated == "exact" for s in sites(plan)):
                    torch.testing.assert_close(found[0], dense[name][which][0], **TOLERANCE["fp32"])
                counts["right"] += 1
                assert lemo_fx.revert(model) is model
            assert anatomy(model) == before[name]
            if number % 5 == 0:
                assert_same_step(step(model, inputs), dense[name][which], "same")
        except Exception as error:
            error.add_note(f"config {number} on {name}, batch {which}: {plan}")
            raise
    for name, model in models.items():
        for inputs, expected in zip(BATCHES, dense[name], strict=True):
            assert_same_step(step(model, inputs), expected, "same")
    assert min(counts.values()) > trials / 20, counts
