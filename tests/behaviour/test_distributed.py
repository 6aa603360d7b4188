"""Several processes: DDP, FSDP2 and FSDP1 train as one process does, and everything else is refused by name."""

import importlib.util
import json
from pathlib import Path

import pytest
import ranks
import torch
from peft import PeftModel
from processes import ended, free_ports, start
from tiny import TOLERANCE, assert_same_step, batch, step, tiny, with_lora
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from transformers.modeling_layers import GradientCheckpointingLayer

import lemo_fx

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_two_ranks(tmp_path):
    """See tests/helpers/ranks.py for what the ranks check; the Trainer's results meet one process's here."""
    started = start(Path(ranks.__file__), tmp_path, 2, str(tmp_path), *free_ports(2))
    losses, model = ranks.train(tmp_path / "alone", 2)
    assert ended(*started, 400) == [0, 0]

    several = json.loads((tmp_path / "losses.json").read_text())
    assert len(losses) == 4
    for name, found in several.items():
        torch.testing.assert_close(found, losses, **TOLERANCE["fp32"], msg=lambda text, name=name: f"{name}: {text}")
    ids = batch(1, 40)["input_ids"]
    logits = lemo_fx.revert(model).eval()(ids).logits
    for folder in ("ddp", "fsdp2", "ram"):
        loaded = PeftModel.from_pretrained(tiny("llama", 3), tmp_path / folder).eval()
        torch.testing.assert_close(loaded(ids).logits, logits, **TOLERANCE["compiled"])
    assert (tmp_path / "example" / "adapter_model.safetensors").stat().st_size > 1000

    scaling = json.loads((tmp_path / "scaling" / "tiny-2.json").read_text())
    assert [run["wrap"] for run in scaling["runs"]] == ["ddp", "fsdp2"]
    for run in scaling["runs"]:
        assert run["loss"] == pytest.approx(run["loss_one_process"], rel=1e-6)
        assert run["samples"] == 4
        assert 0 < run["communication_share"] < 1
    assert drawn(tmp_path / "scaling" / "tiny-2.json").exists()


def tool(name: str):
    specification = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def drawn(path: Path) -> Path:
    return tool("plot_benchmarks").draw_scaling([path])


def test_share_of_communication(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    overlap = tool("bench_scaling").overlap
    assert overlap([], [(0, 5)]) == (0.0, 0.0)
    assert overlap([(0, 4), (2, 6)], [(5, 10)]) == (0.6, pytest.approx(1 / 6))
    assert overlap([(0, 1)], [(1, 4)]) == (0.25, 0.0)
    assert overlap([(1, 2)], [(0, 4), (0, 3)]) == (0.25, 1.0)


def test_first_named_runs_come_first(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    in_order = tool("bench_scaling").in_order
    assert in_order([32, 8], ["ddp"], "ab") == [(32, "ddp", "a"), (32, "ddp", "b"), (8, "ddp", "a"), (8, "ddp", "b")]
    assert in_order("ab", "xy", "12")[0] == ("a", "x", "1")
    assert in_order("ab", "xy", "12")[-1] == ("b", "y", "2")


def test_table_of_scaling(tmp_path):
    """Efficiency is against one process of the same variant, speed-up against LoRA of the same number and wrapper."""
    rates = {1: {"none": (100, 200)}, 2: {"ddp": (190, 380), "fsdp2": (180, 396)}}
    paths = []
    for count, wraps in rates.items():
        runs = [
            {"wrap": wrap, "variant": variant, "tokens": 64, "step_ms": 1.0, "tokens_per_s": rate}
            | {"loss": 2.0, "loss_one_process": 2.0, "peak_allocated_gb": 3.0}
            | ({"communication_share": 0.25, "communication_overlapped": 0.5} if count > 1 else {})
            for wrap, pair in wraps.items()
            for variant, rate in zip(("lora-checkpointed", "step-0.375-checkpointed"), pair, strict=True)
        ]
        runs.append({"wrap": "ddp", "variant": "step-0.25-checkpointed", "tokens": 64, "failed": "OutOfMemoryError"})
        result = {"shape": "made-up", "processes": count, "environment": {"device": "none"}, "runs": runs}
        paths.append(tmp_path / f"made-up-{count}.json")
        paths[-1].write_text(json.dumps(result))
    plots = tool("plot_benchmarks")
    lines = plots.scaling_table(paths[::-1]).splitlines()[2:]
    assert lines == [
        "| 64 | LoRA, checkpointed | 1 |  | 1 ms | 100 | 100.0% | 1.00x | 3.0 GB |  | 0.0e+00 |",
        "| 64 | exact 0.375, checkpointed | 1 |  | 1 ms | 200 | 100.0% | 2.00x | 3.0 GB |  | 0.0e+00 |",
        "| 64 | LoRA, checkpointed | 2 | DDP | 1 ms | 190 | 95.0% | 1.00x | 3.0 GB | 25.0% (50%) | 0.0e+00 |",
        "| 64 | exact 0.375, checkpointed | 2 | DDP | 1 ms | 380 | 95.0% | 2.00x | 3.0 GB | 25.0% (50%) | 0.0e+00 |",
        "| 64 | LoRA, checkpointed | 2 | FSDP2 | 1 ms | 180 | 90.0% | 1.00x | 3.0 GB | 25.0% (50%) | 0.0e+00 |",
        "| 64 | exact 0.375, checkpointed | 2 | FSDP2 | 1 ms | 396 | 99.0% | 2.20x | 3.0 GB | 25.0% (50%) | 0.0e+00 |",
    ]
    plots.main(paths)
    assert (tmp_path / "made-up.png").stat().st_size > 1000
    assert (tmp_path / "made-up.md").exists()


def test_data_parallel_threads_are_refused():
    model = lemo_fx.transform(tiny("llama"), ranks.config())
    replica = model._replicate_for_data_parallel()
    with pytest.raises(lemo_fx.LemoError, match="one process per GPU"):
        replica(**batch(2, 48))


def test_checkpoint_wrappers_go_on_top():
    inputs = batch(2, 48)
    wrappable = {"check_fn": lambda module: isinstance(module, GradientCheckpointingLayer)}
    model = lemo_fx.transform(with_lora(tiny("llama")), ranks.config())
    expected = step(model, inputs)
    apply_activation_checkpointing(model, **wrappable)
    loss, found = step(model, inputs)
    found = {name.replace("_checkpoint_wrapped_module.", ""): gradient for name, gradient in found.items()}
    assert_same_step((loss, found), expected, "fp32")

    wrapped = with_lora(tiny("llama"))
    apply_activation_checkpointing(wrapped, **wrappable)
    with pytest.raises(lemo_fx.LemoError, match=r"layers\.0 is a CheckpointWrapper"):
        lemo_fx.transform(wrapped, ranks.config())


def test_classes_put_on_top_by_others_are_left_alone():
    model = lemo_fx.transform(tiny("llama"), ranks.config())
    layer = model.model.layers[0]
    layer.__class__ = type("Other", (type(layer),), {})
    with pytest.raises(lemo_fx.LemoError, match="Other was put on top by another library"):
        lemo_fx.revert(model)


def test_any_rewritten_class_stands_for_the_original():
    """Sharding policies take the class of the first layer of a name and ask isinstance of the others."""
    model = lemo_fx.transform(tiny("llama", 3), ranks.config(dense_layers=(1,)))
    rewritten, dense, _ = model.model.layers
    assert type(rewritten) is not type(dense)
    assert isinstance(dense, type(rewritten))
    assert isinstance(rewritten, type(dense))
    assert not isinstance(model.lm_head, type(rewritten))
