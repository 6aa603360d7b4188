"""tools/bench_scaling.py in a process of its own group: its options do what they say, and the loss stays."""

import datetime

import bench_scaling
import pytest
import torch
import torch.distributed as dist
from bench_model import SHAPES, Variant
from torch.distributed.fsdp import FSDPModule

from lemo_fx.graph.anatomy import decoder_layers

LAYERS = SHAPES["tiny"]().num_hidden_layers
SETTINGS = {"count": 1, "steps": 1, "warm_up": 0, "cap": 1e9, "adapters": "float32", "profiled": False}
CPU = torch.device("cpu")


@pytest.mark.parametrize("wrap", ["sequence-fsdp2", "fsdp2"])
def test_a_long_step_warms_up_in_few_layers_and_asks_for_weights_ahead(wrap, gloo, monkeypatch):
    ran, asked = [], {"forward": [], "backward": []}
    run_step = bench_scaling.run_step
    monkeypatch.setattr(
        bench_scaling, "run_step", lambda model, ids: ran.append(len(decoder_layers(model))) or run_step(model, ids)
    )
    for way, asks in asked.items():
        name = f"set_modules_to_{way}_prefetch"
        own = getattr(FSDPModule, name)
        monkeypatch.setattr(
            FSDPModule, name, lambda layer, ahead, own=own, asks=asks: asks.append(len(ahead)) or own(layer, ahead)
        )
    record = {"wrap": wrap, "tokens": 256, "failed": ""}
    variant = Variant.named("step-0.5-eager")
    settings = {**SETTINGS, "warm_layers": LAYERS - 1, "prefetch": 2}
    bench_scaling.measure(record, lambda: None, "tiny", variant, device=CPU, **settings)
    assert ran == [LAYERS - 1, LAYERS]
    assert record["warm_layers"] == LAYERS - 1
    assert asked["forward"] == [min(2, LAYERS - 1 - index) for index in range(LAYERS)]
    assert asked["backward"] == [min(2, index) for index in range(LAYERS)]
    assert record["loss"] == pytest.approx(record["loss_one_process"], rel=1e-6)
    assert record["timed_steps"] == 1


def test_a_rank_without_the_others_does_not_wait_for_half_an_hour(tmp_path, monkeypatch):
    waits = []

    def alone(*_, timeout=dist.default_pg_timeout):
        waits.append(timeout)
        raise dist.DistNetworkError

    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setattr(dist, "rendezvous", alone)
    with pytest.raises(dist.DistNetworkError):
        bench_scaling.main("tiny", "256", out=tmp_path)
    assert waits == [datetime.timedelta(seconds=120)]
