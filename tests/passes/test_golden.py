"""The rewritten Llama layer as text, reviewed by people.

After an intended change: `LEMO_UPDATE_GOLDENS=1 pytest tests/passes/test_golden.py`, then read the diff.
"""

import os
from pathlib import Path

import pytest
from tiny import tiny

import lemo_fx
from lemo_fx import Elimination, LemoConfig
from lemo_fx.graph.capture import readable
from lemo_fx.runtime.layer import STATE

GOLDENS = Path(__file__).parent / "goldens"


@pytest.mark.parametrize("treatment", ["skip", "exact"])
def test_llama(treatment):
    site = Elimination(keep=0.5, eliminated=treatment, score="measured")
    model = lemo_fx.transform(tiny("llama"), LemoConfig(site, site, block_size=8, dense_layers=()))
    layer = model.model.layers[0]
    record = vars(layer)[STATE]
    # Transformers before 5.24 call a layer's cache past_key_values.
    text = readable(record.graph, record.functions, type(layer).__name__).replace("past_key_values", "cache")
    path = GOLDENS / f"llama_{treatment}.txt"
    if os.environ.get("LEMO_UPDATE_GOLDENS"):
        path.write_text(text)
    assert text == path.read_text()


def test_layers_of_one_kind_share_their_text():
    model = lemo_fx.transform(tiny("llama", 3), LemoConfig(block_size=8, dense_layers=()))
    codes = [g.code for n, g in lemo_fx.graphs(model).items() if n]
    assert len(codes) == 3
    assert len(set(codes)) == 1
