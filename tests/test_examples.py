"""The scripts of examples/ on the shipped model; fsdp2.py runs in test_distributed.py."""

import importlib.util
import runpy
from pathlib import Path

import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.parametrize(("name", "settings"), [("trainer", {}), ("trl_sft", {}), ("loop", {"backend": "eager"})])
def test_example(name, settings, tmp_path, capsys):
    if name == "trl_sft" and importlib.util.find_spec("trl") is None:
        pytest.skip("trl is not installed")
    example = runpy.run_path(str(EXAMPLES / f"{name}.py"))
    example["main"](out=tmp_path, tokens=256, steps=2, **settings)
    printed = capsys.readouterr().out
    assert "model.layers.3" in printed
    assert "loss" in printed
    base = AutoModelForCausalLM.from_pretrained(example["SHIPPED"] / "model")
    adapter = PeftModel.from_pretrained(base, tmp_path)
    trained = [p for n, p in adapter.named_parameters() if "lora_B" in n]
    assert len(trained) == 7 * 8
    assert all(p.abs().max() > 0 for p in trained)
