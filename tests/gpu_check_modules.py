"""What tests of scripts/gpu_check and tune share: their modules, which this puts on the path, and a machine."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "eval" / "gpu_check"))

ABOUT = {
    "gpu": "a GPU", "arch": 90, "driver": "1", "torch": "2", "triton": "3", "cuda": "13", "sources": "abc", "date": "d"
}  # fmt: skip
