"""The model part: eval/bench_generate.py, once per kind of weight, in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from check_device import ROOT

__all__ = ["bench_generate"]


def bench_generate(shape: str, weights: str, seconds: float) -> dict[str, Any]:
    """Run it and read what it found.

    Args:
        shape: ``llama-3-8b`` or ``tiny``.
        weights: ``bf16``, ``w4`` or ``w8``.
        seconds: when to give up.

    Raises:
        subprocess.TimeoutExpired: it took longer.
        RuntimeError: it failed.
    """
    command = [sys.executable, str(ROOT / "eval" / "bench_generate.py"), "--shape", shape, "--weights", weights]
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        done = subprocess.run([*command, "--json", str(result)], capture_output=True, text=True, timeout=seconds)
        if done.returncode == 2:
            return {"text": f"not run: {done.stderr.strip().splitlines()[-1]}"}
        if done.returncode:
            raise RuntimeError(f"eval/bench_generate.py --weights {weights}: {done.stderr[-1500:]}")
        rows = json.loads(result.read_text(encoding="utf-8"))["rows"]
    text = "; ".join(
        f"batch {row['batch']}: prefill {row['prefill_tokens_per_s']:.0f} tok/s, "
        f"decode {row['decode_tokens_per_s']:.1f} tok/s, peak {row['peak_bytes'] / 2**30:.2f} GiB"
        for row in rows
    )
    return {"rows": rows, "text": text}
