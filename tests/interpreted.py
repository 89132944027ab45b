"""Test files that run kernels in Triton's interpreter run themselves, in a process of its own.

Triton decides at import whether to interpret. So such a file holds one test where nothing is interpreted, and the real
ones where it is::

    if not INTERPRETING:

        def test_in_an_interpreting_process():
            assert_passes_interpreted(__file__)

    else:
        ...
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"

# Triton 3.6's interpreter takes the bounds of a loop out of arrays in a way that numpy is going to forbid.
BOUNDS_FROM_ARRAYS = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning")


def assert_passes_interpreted(file: str) -> None:
    """Runs a test file in a process that interprets; its output is the assertion's message."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", file],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
