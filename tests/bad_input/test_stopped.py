"""Work that cannot be finished (a full disk, Ctrl-C, numbers that overflow) leaves nothing behind."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time

import pytest
from safetensors.torch import load_file, save_file

from refusals import CALIBRATED, ENV, TEXT, arguments, one_message, tree
from tiny_models import BOOKS_4M

LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), int(sys.argv[1])))
from lowbit.cli import main
sys.exit(main(sys.argv[2:]))
"""


def test_a_file_system_that_refuses_to_write(model, out, tmp_path):
    """Files end at 1 MB here; the model's shard is larger."""
    before = tree(tmp_path)
    command = [sys.executable, "-c", LIMITED, "1000000", *arguments(model, out, *CALIBRATED, "--method", "rtn")]
    done = subprocess.run(command, capture_output=True, text=True, env=ENV, timeout=300)
    assert done.returncode == 2, done.stderr
    message = one_message(done.stdout, done.stderr)
    assert "File too large" in message and "cannot write" in message and out.name in message
    assert tree(tmp_path) == before


def mounts_are_allowed():
    probe = "mount -t tmpfs none /mnt"
    unshare = shutil.which("unshare")
    return (
        unshare is not None and not subprocess.run([unshare, "-Urm", "sh", "-c", probe], capture_output=True).returncode
    )


@pytest.mark.skipif(not mounts_are_allowed(), reason="no unprivileged mount of a small disk here")
@pytest.mark.parametrize("too_much", ["tokenizer.json", "model.safetensors", "lowbit.json"])
def test_a_full_disk(model, packed, tmp_path, too_much):
    """A real disk that is too small and holds an older result; what is left on it is listed before it goes."""
    pages = {path.name: -(-path.stat().st_size // 4096) for path in packed.iterdir()}
    fits = {
        "tokenizer.json": 20,
        "model.safetensors": 150,
        "lowbit.json": sum(pages.values()) - pages["lowbit.json"] + 2,
    }
    size = 4096 * fits[too_much]
    disk = tmp_path / "disk"
    disk.mkdir()
    before = tree(model)
    script = """
        mount -t tmpfs -o "size=$4" none "$1" && mkdir "$1/out" && echo '{}' > "$1/out/config.json" || exit 99
        "$2" -m lowbit quantize "$3" "$1/out" --method rtn --group-size 32 --overwrite
        echo "status $?"
        ls -A "$1" "$1/out"
    """
    command = ["unshare", "-Urm", "sh", "-c", script, "sh", str(disk), sys.executable, str(model), str(size)]
    done = subprocess.run(command, capture_output=True, text=True, env=ENV, timeout=300)
    assert done.stdout.split() == ["status", "2", f"{disk}:", "out", f"{disk}/out:", "config.json"]
    assert done.stderr.count("lowbit: error: ") == 1 and "Traceback" not in done.stderr
    assert "No space left on device" in done.stderr
    assert too_much in done.stderr, "it got that far"
    assert tree(model) == before


@pytest.mark.parametrize(
    ("sent", "status", "said", "delay"),
    [
        pytest.param(signal.SIGINT, 130, "interrupted", 0.0, id="Ctrl-C at the start"),
        pytest.param(signal.SIGINT, 130, "interrupted", 0.7, id="Ctrl-C in the middle"),
        pytest.param(signal.SIGTERM, 143, "terminated", 0.7, id="a container that is stopped"),
        pytest.param(signal.SIGHUP, 129, "the terminal was closed", 0.7, id="a connection that is lost"),
    ],
)
def test_a_signal_while_quantizing(interruptible, out, tmp_path, sent, status, said, delay):
    before, source = tree(tmp_path), tree(BOOKS_4M)
    options = ["--calibration", TEXT, "--samples", "16", "--seq-len", "256", "--device", "cpu"]
    command = [sys.executable, "-m", "lowbit", *arguments(BOOKS_4M, out, *options)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENV) as process:
        first = process.stderr.readline()
        assert first.startswith("plan: 28 weights"), first + process.stderr.read()
        time.sleep(delay)
        assert any(".tmp-" in path.name for path in out.parent.iterdir()), "it is at work"
        process.send_signal(sent)
        stdout, stderr = process.communicate(timeout=300)
    # Python ends by SIGINT itself if that came while a string was executed, in an import for one; a shell says 130.
    assert process.returncode in (status, -signal.SIGINT), stderr
    assert stdout == "" and stderr.count("lowbit: ") == 1 and stderr.endswith(f"lowbit: {said}\n")
    assert "Traceback" not in stderr
    assert tree(tmp_path) == before and tree(BOOKS_4M) == source


def test_a_failure_in_the_middle_leaves_nothing(refused, model, out, monkeypatch):
    """Inputs that overflow only once the blocks run: the work has begun when it shows."""
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"] *= 1e30
    tensors["model.layers.0.mlp.gate_proj.weight"] *= 1e30
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    message = refused(arguments(model, out, *CALIBRATED), before_work=False)
    assert "NaN or infinite" in message
