"""Two GPUs that share sequences under accelerate's `sp_size`: steps are those of one process.

python -m pytest -m gpu tests/gpu/test_sharing.py   (two GPUs, DeepSpeed)
"""

from importlib.util import find_spec
from pathlib import Path

import pytest
import sharing_gpus
import torch
from processes import ended, start

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
    pytest.mark.skipif(not find_spec("deepspeed"), reason="needs DeepSpeed"),
]


@pytest.mark.parametrize("case", sharing_gpus.CASES)
def test_two_gpus_train_as_one_process(case, tmp_path):
    """ZeRO stage 2, padded batches: losses of six steps, and in float32 every weight after them."""
    assert ended(*start(Path(sharing_gpus.__file__), tmp_path, 2, case, str(tmp_path)), 500) == [0, 0]
    expected = sharing_gpus.trained(case, tmp_path / "alone")
    for rank in (0, 1):
        found = torch.load(tmp_path / f"{rank}.pt")
        torch.testing.assert_close(found["losses"], expected["losses"], rtol=sharing_gpus.CASES[case][2], atol=0)
        assert found["losses"][0] > 1.02 * found["losses"][-1]  # Nothing is compared where nothing is learned.
        for name, value in expected.items() if case == "float32" else ():
            torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-5)
