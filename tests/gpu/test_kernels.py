"""The kernels on a real GPU: the correctness suite of scripts/gpu_check, check by check."""

import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no CUDA GPU here (torch.cuda.is_available() is False)"
)
sys.path.append(str(Path(__file__).parents[2] / "eval" / "gpu_check"))


def suite():
    """Every check of this machine's GPU; none without one."""
    if not torch.cuda.is_available():
        return []
    from check_correct import checks

    major, minor = torch.cuda.get_device_capability()
    return list(checks(torch.device("cuda"), 10 * major + minor, tiny=False))


CHECKS = suite()


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.name)
def test_check(check):
    try:
        check.run()
    except MemoryError as reason:
        pytest.skip(str(reason))
