"""CheckpointWriter: the folder appears complete at its name, or not at all, whatever happens."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

import lowbit
import lowbit.writer as writer_module
from lowbit.checkpoint import CheckpointWriter, check_output, read_checkpoint
from packed_folder import TINY_LAYERS as LAYERS
from packed_folder import names_in, write_tiny


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_tiny(tmp_path / "packed", LAYERS)


def test_what_was_written_reads_back(folder: Path) -> None:
    checkpoint = read_checkpoint(folder)
    assert checkpoint.hashes_verified
    assert list(checkpoint.dense) == ["norm.weight"]
    assert checkpoint.record == {"lowbit_version": lowbit.__version__, "model": "tiny", "method": "rtn"}
    assert checkpoint.linears.keys() == LAYERS.keys()
    for name, qw in LAYERS.items():
        back = checkpoint.quantized_weight(name)
        assert checkpoint.linears[name].spec == back.spec == qw.spec
        assert torch.equal(back.codes, qw.codes)
        assert torch.equal(back.scales, qw.scales)
        assert (back.zeros is None) == (qw.zeros is None)
        assert qw.zeros is None or torch.equal(back.zeros, qw.zeros)


def test_the_manifest_lists_every_file_with_its_hash(folder: Path) -> None:
    manifest = json.loads((folder / "lowbit.json").read_text())
    assert sorted(manifest["files"]) == [name for name in names_in(folder) if name != "lowbit.json"]
    for name, entry in manifest["files"].items():
        data = (folder / name).read_bytes()
        assert entry == {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}


def test_shards_are_cut_by_size_and_hold_the_same_tensors(tmp_path: Path) -> None:
    one = load_file(write_tiny(tmp_path / "one", LAYERS) / "model.safetensors")
    many = write_tiny(tmp_path / "many", LAYERS, max_shard_bytes=300)
    shards = sorted(many.glob("model-*.safetensors"))
    assert len(shards) > 2
    assert shards[0].name == f"model-00001-of-{len(shards):05d}.safetensors"
    index = json.loads((many / "model.safetensors.index.json").read_text())
    loaded = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
    assert index["weight_map"].keys() == loaded.keys() == one.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in one.values())
    assert all(torch.equal(loaded[name], one[name]) for name in one)
    assert all(sum(t.nbytes for t in load_file(shard).values()) <= 300 for shard in shards)
    assert read_checkpoint(many).linears == read_checkpoint(tmp_path / "one").linears


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    a, b = write_tiny(tmp_path / "a", LAYERS), write_tiny(tmp_path / "b", LAYERS)
    assert {p.name: p.read_bytes() for p in a.iterdir()} == {p.name: p.read_bytes() for p in b.iterdir()}


def test_views_and_shared_tensors_are_stored_by_value(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    with CheckpointWriter(tmp_path / "out") as writer:
        writer.add("row", base[1])
        writer.add("transposed", base.t())
        writer.add("whole", base)
        writer.add("again", base)
        writer.add_json("config.json", {})
        writer.finish({})
    loaded = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(loaded["row"], base[1])
    assert torch.equal(loaded["transposed"], base.t())
    assert torch.equal(loaded["whole"], loaded["again"])
    assert (tmp_path / "out" / "model.safetensors").stat().st_size < 8 + 500 + (4 + 3 * 12) * 4


def test_a_float_that_is_not_finite_becomes_null_in_the_record(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path / "out") as writer:
        writer.add("a", torch.ones(1))
        writer.add_json("config.json", {})
        writer.finish({"layers": [{"loss": float("nan")}]})
    assert json.loads((tmp_path / "out" / "lowbit.json").read_text())["layers"] == [{"loss": None}]


def test_every_file_and_folder_reaches_the_disk_before_the_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    monkeypatch.setattr(writer_module, "fsync_path", lambda path: synced.append(str(path)))
    rename = Path.rename

    def spy(self: Path, target: Path) -> Path:
        synced.append(f"rename to {target.name}")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", spy)
    out = write_tiny(tmp_path / "out", LAYERS)
    temporary = tmp_path / f".out.tmp-{os.getpid()}"
    order = synced.index("rename to out")
    assert {str(temporary), *(str(temporary / name) for name in names_in(out))} <= set(synced[:order])
    assert str(tmp_path) in synced[order:]


@pytest.mark.parametrize("kind", ["folder", "file", "link", "not a model"])
def test_an_existing_output_is_refused_before_any_work(tmp_path: Path, kind: str) -> None:
    out = tmp_path / "out"
    if kind == "file":
        out.write_text("mine")
    elif kind == "link":
        out.symlink_to(tmp_path / "elsewhere")
    else:
        out.mkdir()
        (out / "notes.txt").write_text("mine")
    before = names_in(tmp_path)
    with pytest.raises(FileExistsError, match="out"):
        CheckpointWriter(out, overwrite=kind != "folder")
    assert names_in(tmp_path) == before


def test_the_output_must_be_apart_from_the_input(tmp_path: Path) -> None:
    source = tmp_path / "models" / "source"
    source.mkdir(parents=True)
    for out in (source, source / "out", tmp_path / "models", source / ".." / "source"):
        with pytest.raises(ValueError, match="outside the input folder"):
            check_output(out, source, overwrite=True)
    check_output(tmp_path / "models" / "out", source, overwrite=False)
    check_output(tmp_path / "out", "org/model", overwrite=False)
    with pytest.raises(ValueError, match="with a name"):
        check_output("/", None, overwrite=True)


def test_a_tilde_is_the_home_folder_of_the_output_and_of_the_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    for source, out in (("~/model", tmp_path / "model"), (tmp_path / "model", "~/model"), ("~/model", "~/model/in")):
        with pytest.raises(ValueError, match="outside the input folder"):
            check_output(out, source, overwrite=True)
    write_tiny(Path("~/packed"), LAYERS)
    assert "config.json" in names_in(tmp_path / "packed")
    assert not (tmp_path / "~").exists()


def test_every_file_is_as_readable_as_the_umask_says(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        many = write_tiny(tmp_path / "many", LAYERS, max_shard_bytes=300)
    finally:
        os.umask(old)
    assert {path.stat().st_mode & 0o777 for path in many.iterdir()} == {0o640}


def test_overwriting_replaces_the_whole_folder(tmp_path: Path) -> None:
    out = write_tiny(tmp_path / "out", LAYERS, max_shard_bytes=400)
    (out / "README.md").write_text("old")
    write_tiny(out, {"only": LAYERS["layers.0.up"]}, overwrite=True)
    assert names_in(tmp_path) == ["out"]
    assert names_in(out) == ["config.json", "lowbit.json", "model.safetensors"]
    assert list(read_checkpoint(out).linears) == ["only"]


def full_disk(*_: object, **__: object) -> None:
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def interrupted(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def failing_sync(*_: object, **__: object) -> None:
    raise OSError(errno.EIO, "Input/output error")


FAILURES = {
    "full disk in a shard": ("save_file", full_disk, OSError),
    "interrupt in a shard": ("save_file", interrupted, KeyboardInterrupt),
    "interrupt while hashing": ("build_manifest", interrupted, KeyboardInterrupt),
    "failing disk": ("fsync_path", failing_sync, OSError),
}


@pytest.mark.parametrize("replacing", [False, True], ids=["new", "overwrite"])
@pytest.mark.parametrize(("function", "failure", "error"), FAILURES.values(), ids=FAILURES)
def test_a_failure_leaves_nothing_behind(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    function: str,
    failure: Callable[..., None],
    error: type[BaseException],
    replacing: bool,
) -> None:
    out = tmp_path / "new" / "parents" / "out"
    before = {p.name: p.read_bytes() for p in write_tiny(out, LAYERS).iterdir()} if replacing else None
    with monkeypatch.context() as patch:
        patch.setattr(writer_module, function, failure)
        with pytest.raises(error) as caught:
            write_tiny(out, {"only": LAYERS["layers.0.up"]}, overwrite=True)
    if failure is full_disk:
        assert isinstance(caught.value, OSError)
        assert caught.value.errno == errno.ENOSPC
    if before is None:
        assert names_in(tmp_path) == []
    else:
        assert names_in(out.parent) == ["out"]
        assert {p.name: p.read_bytes() for p in out.iterdir()} == before


@pytest.mark.parametrize("step", ["old aside", "new in", "after"])
def test_an_interrupt_around_the_renames_restores_the_old_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    out = write_tiny(tmp_path / "out", LAYERS)
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    rename, renames = Path.rename, 0

    def stop(self: Path, target: Path) -> Path:
        nonlocal renames
        if self.parent != tmp_path:
            return rename(self, target)
        renames += 1
        if renames == {"old aside": 1, "new in": 2, "after": 0}[step]:
            raise KeyboardInterrupt
        result = rename(self, target)
        if step == "after" and renames == 2:
            raise KeyboardInterrupt
        return result

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", stop)
        with pytest.raises(KeyboardInterrupt):
            write_tiny(out, {"only": LAYERS["layers.0.up"]}, overwrite=True)
    assert names_in(tmp_path) == ["out"]
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before


@pytest.mark.parametrize("fails", ["appeared meanwhile", "cannot be renamed"])
def test_a_finished_checkpoint_is_kept_when_only_its_name_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    """The work of hours, and somebody else's folder stays, too."""
    writer = CheckpointWriter(tmp_path / "out")
    with pytest.raises(OSError, match="the finished checkpoint is kept in") as raised, writer:
        for name, tensor in {"a": torch.ones(3)}.items():
            writer.add(name, tensor)
        writer.add_json("config.json", {})
        if fails == "appeared meanwhile":
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "config.json").write_text("somebody else's")
        else:
            monkeypatch.setattr(Path, "rename", rename_but_not_to(tmp_path / "out"))
        writer.finish({})
    kept = Path(str(raised.value).rpartition("kept in ")[2])
    assert torch.equal(load_file(kept / "model.safetensors")["a"], torch.ones(3)) and (kept / "lowbit.json").exists()
    assert (fails == "appeared meanwhile") == (tmp_path / "out").exists()


def rename_but_not_to(out: Path) -> Callable[[Path, Path], Path]:
    rename = Path.rename

    def stop(self: Path, target: Path) -> Path:
        if Path(target) == out:
            raise OSError(errno.EBUSY, "Device or resource busy", str(target))
        return rename(self, target)

    return stop


def test_a_mount_point_is_refused_before_the_work() -> None:
    mounted = next(path for path in ("/proc", "/dev/shm", "/dev") if Path(path).is_mount())
    with pytest.raises(ValueError, match=f"the output {mounted} is a mount point"):
        check_output(mounted, None, overwrite=True)


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    root = Path(__file__).parent.parent
    paths = os.pathsep.join([str(root), str(root / "kernels"), str(root / "tests")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], env=environment, capture_output=True, text=True, timeout=120
    )


@pytest.mark.skipif(sys.platform == "win32", reason="file size limits are POSIX")
def test_a_file_the_system_refuses_to_write_is_an_oserror_and_leaves_nothing(tmp_path: Path) -> None:
    done = run_python(f"""
        import resource, signal, torch
        from pathlib import Path
        from lowbit.checkpoint import CheckpointWriter
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            with CheckpointWriter({str(tmp_path / "out")!r}) as writer:
                writer.add("a", torch.ones(200_000))
                writer.add_json("config.json", {{}})
                writer.finish({{}})
        except OSError as error:
            print("OSError", error.errno)
    """)
    assert done.stdout.split() == ["OSError", str(errno.EFBIG)], done.stderr
    assert names_in(tmp_path) == []


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL is POSIX")
def test_a_killed_process_leaves_no_output_folder(tmp_path: Path) -> None:
    done = run_python(f"""
        import os, signal, torch
        from lowbit.checkpoint import CheckpointWriter
        with CheckpointWriter({str(tmp_path / "out")!r}, max_shard_bytes=100) as writer:
            writer.add("a", torch.ones(200))
            os.kill(os.getpid(), signal.SIGKILL)
    """)
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    write_tiny(tmp_path / "out", LAYERS)  # and what it left does not stand in the way


def test_misuse_of_the_writer_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    out = tmp_path / "out"

    def twice(writer: CheckpointWriter) -> None:
        writer.add("a", torch.ones(1))
        writer.add("a", torch.ones(1))

    def without_config(writer: CheckpointWriter) -> None:
        writer.add("a", torch.ones(1))
        writer.finish({})

    cases: list[tuple[Callable[[CheckpointWriter], object], str]] = [
        (twice, "added twice"),
        (without_config, "needs a config.json"),
        (lambda w: w.finish({}), "at least one tensor"),
        (lambda w: w.add("a", torch.ones(1, device="meta")), "meta"),
        (lambda w: w.add("a", torch.ones(1, dtype=torch.complex64)), "complex64"),
        (lambda w: w.add_json("../config.json", {}), "plain file name"),
        (lambda w: w.add_json("lowbit.json", {}), "uses itself"),
        (lambda w: w.add_json("model.safetensors", {}), "uses itself"),
        (lambda w: w.add_json("config.json", {"a": float("nan")}), "Out of range float"),
    ]
    for misuse, message in cases:
        with pytest.raises(ValueError, match=message), CheckpointWriter(out) as writer:
            misuse(writer)
    with pytest.raises(RuntimeError, match=r"finish\(\) was not called"), CheckpointWriter(out) as writer:
        writer.add("a", torch.ones(1))
    with pytest.raises(ValueError, match="max_shard_bytes"):
        CheckpointWriter(out, max_shard_bytes=0)
    assert names_in(tmp_path) == []
