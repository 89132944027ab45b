"""What tests of the command line share that expect one message and nothing changed: arguments, damage, comparison."""

from __future__ import annotations

import hashlib
import os
import struct
from pathlib import Path

ROOT = Path(__file__).parent.parent
TEXT = str(ROOT / "eval" / "data" / "books-calib.txt")
ENV = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
CALIBRATED = ["--calibration", TEXT, "--samples", "4", "--seq-len", "32", "--group-size", "32", "--device", "cpu"]


def tree(folder):
    """Everything below a folder, with the content's hash."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def arguments(model, out, *options):
    return ["quantize", str(model), str(out), *options, *(["--overwrite"] if out.exists() else [])]


def one_message(out, err):
    """The message, the only one, on stderr."""
    assert out == "", "nothing on stdout"
    assert "Traceback" not in err and "Warning" not in err
    assert err.count("lowbit: error: ") == 1
    return err.partition("lowbit: error: ")[2].rstrip("\n")


def corrupt_header(shard):
    data = bytearray(shard.read_bytes())
    data[8:40] = b"\xff" * 32
    shard.write_bytes(data)


def absurd_header_size(shard):
    shard.write_bytes(struct.pack("<Q", 2**60) + shard.read_bytes()[8:])


def cut(keep):
    def truncate(shard):
        shard.write_bytes(shard.read_bytes()[: int(shard.stat().st_size * keep)])

    return truncate


DAMAGE = {
    "header overwritten": corrupt_header,
    "header size": absurd_header_size,
    "emptied": cut(0),
    "cut in the header": cut(0.0005),
    "cut in half": cut(0.5),
    "one byte short": lambda shard: shard.write_bytes(shard.read_bytes()[:-1]),
}
