"""The scripts of examples/ on the shipped model; fsdp2.py runs in test_distributed.py."""

import importlib.util
import runpy
from pathlib import Path

import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM

import lemo_fx

EXAMPLES = Path(__file__).parents[1] / "examples"
NEEDS = {"trl_sft": "trl", "trl_chat": "trl", "trl_dpo": "trl", "qlora": "bitsandbytes"}


@pytest.mark.parametrize("name", ["trainer", "loop", "qlora", "trl_sft", "trl_chat", "trl_dpo"])
def test_example(name, tmp_path, capsys, monkeypatch):
    if name in NEEDS and importlib.util.find_spec(NEEDS[name]) is None:
        pytest.skip(f"{NEEDS[name]} is not installed")
    reports = []
    report = lemo_fx.report
    monkeypatch.setattr(lemo_fx, "report", lambda model: reports.append(report(model)) or reports[-1])
    example = runpy.run_path(str(EXAMPLES / f"{name}.py"))
    settings = {"backend": "eager"} if name == "loop" else {}
    example["main"](out=tmp_path, tokens=512, steps=2, **settings)
    printed = capsys.readouterr().out
    assert "model.layers.3" in printed
    assert "loss" in printed
    # In the last step tokens were eliminated, in every layer but the first and the last.
    sites = {
        site.module.removeprefix("base_model.model."): site.kept_share
        for site in reports[-1].sites
        if site.kept_share is not None
    }
    assert {*sites} == {f"model.layers.{i}" for i in range(1, 7)}
    assert all(0 < share < 0.95 for share in sites.values()), sites
    base = AutoModelForCausalLM.from_pretrained(example["SHIPPED"] / "model")
    adapter = PeftModel.from_pretrained(base, tmp_path)
    trained = [p for n, p in adapter.named_parameters() if "lora_B" in n]
    assert len(trained) == 7 * 8
    assert all(p.abs().max() > 0 for p in trained)
