"""transformers' Trainer and TRL's on ranks that share sequences: steps, logs and evaluations are one process's."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from processes import ended, start
from tiny import TOLERANCE

pytest.importorskip("trl")
pytest.importorskip("datasets")

import sharing_trainers

from lemo_fx import LemoConfig

SCRIPT = Path(sharing_trainers.__file__)


@pytest.mark.slow
def test_two_ranks_train_as_one_process(tmp_path):
    """Padded, packed, accumulated, with every loss and sampler that they have."""
    started = start(SCRIPT, tmp_path, 2, str(tmp_path), "the_trainers")
    alone = {name: sharing_trainers.trained(name, tmp_path / "alone") for name in sharing_trainers.TRAINERS}
    assert ended(*started, 500) == [0, 0]
    for case, expected in alone.items():
        for rank in (0, 1):
            found = torch.load(tmp_path / f"{case}{rank}.pt")
            assert len(found["loss"]) == 6
            assert_equal(found, expected, case)


@pytest.mark.slow
def test_two_groups_of_two_ranks(tmp_path):
    """Each has a sample of the batch that one process has."""
    started = start(SCRIPT, tmp_path, 4, str(tmp_path), "samples_and_parts")
    nothing = LemoConfig(None, None, block_size=8)
    expected = sharing_trainers.trained("padded", tmp_path / "alone", settings_of_model=nothing)
    assert ended(*started, 500) == [0] * 4
    for rank in range(4):
        assert_equal(torch.load(tmp_path / f"mesh{rank}.pt"), expected, "samples x parts")


@pytest.mark.slow
@pytest.mark.skipif(not find_spec("deepspeed"), reason="needs DeepSpeed")
@pytest.mark.parametrize("case", ["Trainer", "SFT"])
def test_parts_that_accelerate_cuts(case, tmp_path, monkeypatch):
    """Under its `sp_size`, by DeepSpeed's data loader: the steps of one process."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    import sharing_deepspeed

    started = start(Path(sharing_deepspeed.__file__), tmp_path, 2, str(tmp_path), case)
    expected = sharing_deepspeed.trained(case, tmp_path / "alone")
    assert ended(*started, 500) == [0, 0]
    for rank in (0, 1):
        assert_equal(torch.load(tmp_path / f"{case}{rank}.pt"), expected, case)


def assert_equal(found, expected, case):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, **TOLERANCE["fp32"], msg=lambda text, name=name: f"{case}, {name}: {text}"
        )
