"""`accelerate launch` on the CPU, in a process of its own: a plain loop with what people use of accelerate."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import TOLERANCE

ROOT = Path(__file__).parents[2]

SCRIPT = """
import json, sys, torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from tiny import tiny, with_lora
from training import Rows, plan
import lemo_fx

def train(keep):
    set_seed(1)
    accelerator = Accelerator(gradient_accumulation_steps=2)
    model = with_lora(tiny("llama"), dropout=0.1)
    if keep is not None:
        lemo_fx.transform(model, plan(keep, score="random"))
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    loader = torch.utils.data.DataLoader(Rows(), batch_size=2)
    model, optimiser, loader = accelerator.prepare(model, optimiser, loader)
    losses = []
    for batch in loader:
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            optimiser.zero_grad()
        losses.append(loss.item())
    plain = accelerator.unwrap_model(model)
    shares = [] if keep is None else sorted({site.kept_share for site in lemo_fx.report(plain).sites})
    lemo_fx.revert(plain).eval()(input_ids=Rows()[0]["input_ids"][None])
    return losses, shares, accelerator.mixed_precision

print(json.dumps([train(None), train(1.0), train(0.5)]))
"""


@pytest.mark.slow
def test_launch(tmp_path):
    (tmp_path / "train.py").write_text(SCRIPT)
    paths = [str(ROOT), str(ROOT / "tests" / "helpers"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}
    environment["HF_HOME"] = str(tmp_path)
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
    launch += ["--num_machines", "1", "--dynamo_backend", "no", "--mixed_precision", "no", "train.py"]
    done = subprocess.run(launch, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    original, complete, half = json.loads(done.stdout.splitlines()[-1])
    assert original[2] == "no", "what the launcher was told"
    assert complete[0] == pytest.approx(original[0], rel=TOLERANCE["compiled"]["rtol"])
    assert len(original[0]) == 8
    assert (complete[1], half[1]) == ([1.0], [0.5])
    assert half[0] != complete[0]
