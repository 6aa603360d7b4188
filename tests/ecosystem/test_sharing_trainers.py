"""transformers' Trainer and TRL's on ranks that share sequences: steps, logs and evaluations are one process's."""

from pathlib import Path

import pytest
import torch
from processes import ended, start
from tiny import TOLERANCE

pytest.importorskip("trl")
pytest.importorskip("datasets")

import sharing_trainers

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
            assert found.keys() == expected.keys()
            for name, value in expected.items():
                torch.testing.assert_close(
                    found[name], value, **TOLERANCE["fp32"], msg=lambda text, at=f"{case}, {name}": f"{at}: {text}"
                )
