"""CheckpointWriter: a model folder that appears at its final name complete, or not at all."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import re
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from .headers import INDEX, SINGLE_SHARD
from .manifest import MANIFEST, build_manifest, fsync_path, json_text

__all__ = ["CheckpointWriter", "check_output"]

_DTYPES = (
    torch.float64, torch.float32, torch.float16, torch.bfloat16,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
)  # fmt: skip


def check_output(out: str | os.PathLike[str], source: str | os.PathLike[str] | None, overwrite: bool) -> None:
    """Refuse an output folder before any work is done.

    Args:
        out: where the checkpoint is to appear; ``~`` is the home folder, as for input folders. Missing parents are
            fine, the writer creates them.
        source: the input model's folder, or None or a hub id when it is not a local folder.
        overwrite: whether an existing model folder may be replaced.

    Raises:
        FileExistsError: ``out`` exists and is a file, or a folder while ``overwrite`` is False, or a folder that is
            neither empty nor a model (no config.json): such a folder is never replaced.
        ValueError: ``out`` is the input folder, lies inside it, or contains it, or is a mount point: that
            cannot be replaced in one step.
    """
    target = Path(out).expanduser()
    if not target.name:
        raise ValueError(f"the output must be a folder with a name, got {str(out)!r}")
    read_from = None if source is None else Path(source).expanduser()
    if read_from is not None and read_from.is_dir():
        here, there = target.resolve(), read_from.resolve()
        if here == there or there in here.parents or here in there.parents:
            raise ValueError(f"the output {target} must be outside the input folder {source} and must not contain it")
    if not (target.exists() or target.is_symlink()):
        return
    if target.is_mount():
        raise ValueError(f"the output {target} is a mount point, which cannot be replaced; name a folder inside it")
    if not target.is_dir() or target.is_symlink():
        raise FileExistsError(f"the output {target} exists and is not a folder")
    if not overwrite:
        raise FileExistsError(f"the output folder {target} exists; choose another name or add --overwrite")
    if any(target.iterdir()) and not (target / "config.json").is_file():
        raise FileExistsError(
            f"the output folder {target} has no config.json, so it is not a model and is not replaced"
        )


def _free_name(out: Path, kind: str) -> Path:
    """A name beside ``out`` that nothing has yet: ``.<name>.<kind>-<pid>``, numbered if that one is taken."""
    stem = f".{out.name}.{kind}-{os.getpid()}"
    candidates = (out.parent / (stem if i == 0 else f"{stem}-{i}") for i in itertools.count())
    return next(path for path in candidates if not path.exists())


def _write_json(path: Path, value: Any) -> None:
    text = json_text(value)
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:  # Python names the file when opening fails, but not when writing does
        raise OSError(error.errno, error.strerror, str(path)) from error


class CheckpointWriter:
    """Writes a model folder tensor by tensor; a context manager.

    Everything goes to a temporary folder beside ``out`` (``.<name>.tmp-<pid>``). :meth:`finish` writes
    ``lowbit.json``, flushes every file and folder to the disk and renames. Leaving the ``with`` block in any other way,
    by an exception, a full disk or Ctrl-C, removes the temporary folder and leaves an existing ``out`` untouched. A
    killed process leaves the temporary folder behind, never a part of one at ``out``.

    Args:
        out: final name of the folder. Missing parents are created, and removed again on failure.
        overwrite: replace an existing model folder, at the very end.
        max_shard_bytes: a shard is written once its tensors reach this size. One shard is called
            ``model.safetensors``; several get the usual numbered names and an index.

    Raises:
        FileExistsError: see :func:`check_output`.
        ValueError: ``max_shard_bytes`` is not positive.
    """

    def __init__(
        self, out: str | os.PathLike[str], *, overwrite: bool = False, max_shard_bytes: int = 5 * 2**30
    ) -> None:
        if max_shard_bytes <= 0:
            raise ValueError(f"max_shard_bytes must be positive, got {max_shard_bytes}")
        check_output(out, None, overwrite)
        self._out = Path(out).expanduser().absolute()
        self._overwrite = overwrite
        self._max_shard_bytes = max_shard_bytes
        self._folder: Path | None = None
        self._created_parents: list[Path] = []
        self._buffer: dict[str, Tensor] = {}
        self._buffered_bytes = 0
        self._shards: list[list[str]] = []
        self._names: set[str] = set()
        self._total_bytes = 0
        self._finished = False

    @property
    def path(self) -> Path:
        """The temporary folder; files put there by other means become part of the checkpoint too."""
        if self._folder is None:
            raise RuntimeError("CheckpointWriter must be used as `with CheckpointWriter(out) as writer:`")
        return self._folder

    def __enter__(self) -> CheckpointWriter:
        self._created_parents = [parent for parent in self._out.parents if not parent.exists()]
        try:
            self._out.parent.mkdir(parents=True, exist_ok=True)
            folder = _free_name(self._out, "tmp")
            folder.mkdir()
        except BaseException:
            self._discard()
            raise
        self._folder = folder
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._buffer.clear()
        if self._finished:
            return
        self._discard()
        if kind is None:
            raise RuntimeError(f"CheckpointWriter.finish() was not called; nothing was written to {self._out}")

    def add(self, name: str, tensor: Tensor) -> None:
        """Add one tensor. Referenced, not copied, until its shard is written: do not change it meanwhile.

        Raises:
            ValueError: the name was added before, or the tensor is on meta or of a dtype that is not stored.
            OSError: the shard could not be written (the disk is full, for one).
        """
        if name in self._names:
            raise ValueError(f"tensor {name!r} was added twice")
        if tensor.is_meta or tensor.dtype not in _DTYPES:
            raise ValueError(f"tensor {name!r} cannot be stored: {tensor.dtype} on {tensor.device}")
        size = tensor.numel() * tensor.element_size()
        if self._buffer and self._buffered_bytes + size > self._max_shard_bytes:
            self._flush()
        stored = tensor.detach().to("cpu").contiguous()
        # A view would drag its whole storage along, and two names on one storage are refused by safetensors.
        if stored.untyped_storage().nbytes() != size or self._is_buffered(stored):
            stored = stored.clone()
        self._names.add(name)
        self._buffer[name] = stored
        self._buffered_bytes += size
        self._total_bytes += size
        if self._buffered_bytes >= self._max_shard_bytes:
            self._flush()

    def add_json(self, filename: str, value: Any) -> None:
        """Add a JSON file such as config.json.

        Raises:
            ValueError: the name is not a plain file name, is used already, or ``value`` has no JSON form.
        """
        _write_json(self._new_file(filename), value)

    def add_file(self, source: str | os.PathLike[str], filename: str | None = None) -> None:
        """Add a copy of a file, under its own name unless ``filename`` is given."""
        shutil.copyfile(source, self._new_file(filename or Path(source).name))

    def finish(self, record: Mapping[str, Any]) -> Path:
        """Write what is left and ``lowbit.json``, flush to the disk, and move the folder to its final name.

        Args:
            record: what lowbit.json says about this checkpoint beside version and hashes. JSON-able.

        Returns:
            the final folder.

        Raises:
            ValueError: no tensor or no config.json was added, or the record has no JSON form.
            FileExistsError: the output appeared meanwhile.
            OSError: the disk is full or failed. As with any exception, nothing of this writer is left behind; except
                where only the last step fails, the move: the message then says where the finished checkpoint is.
        """
        if self._buffer:
            self._flush()
        if not self._shards:
            raise ValueError("a checkpoint needs at least one tensor, got none")
        if not (self.path / "config.json").is_file():
            raise ValueError("a checkpoint needs a config.json, none was added")
        self._name_shards()
        from . import __version__  # here, because lowbit/__init__.py imports this module

        manifest = build_manifest(self.path, record, __version__)
        _write_json(self.path / MANIFEST, manifest)
        for path in sorted(self.path.rglob("*")):
            fsync_path(path)
        fsync_path(self.path)
        try:
            self._move_into_place()
        except OSError as error:
            if self.path.exists():
                self._finished = True  # hours of work: nothing but its name is wrong
                kept = f"{error}; the finished checkpoint is kept in {self.path}"
                raise (FileExistsError(kept) if isinstance(error, FileExistsError) else OSError(kept)) from error
            raise
        return self._out

    def _new_file(self, filename: str) -> Path:
        if Path(filename).name != filename or filename == MANIFEST or re.fullmatch(r"model.*\.safetensors.*", filename):
            raise ValueError(f"{filename!r} is not a plain file name, or one the writer uses itself")
        path = self.path / filename
        if path.exists():
            raise ValueError(f"file {filename!r} was added twice")
        return path

    def _is_buffered(self, tensor: Tensor) -> bool:
        pointer = tensor.untyped_storage().data_ptr()
        return any(other.untyped_storage().data_ptr() == pointer for other in self._buffer.values())

    def _flush(self) -> None:
        path = self.path / f"{SINGLE_SHARD}.{len(self._shards):05d}"
        try:
            save_file(self._buffer, path, metadata={"format": "pt"})
        except SafetensorError as error:
            code = re.search(r"os error (\d+)", str(error))
            raise OSError(int(code[1]) if code else errno.EIO, f"cannot write {path}: {error}") from error
        # safetensors makes files only their owner can read; these are to be as readable as config.json beside them.
        path.chmod(self.path.stat().st_mode & 0o666)
        self._shards.append(list(self._buffer))
        self._buffer.clear()
        self._buffered_bytes = 0

    def _name_shards(self) -> None:
        count = len(self._shards)
        weight_map: dict[str, str] = {}
        for i, names in enumerate(self._shards):
            filename = SINGLE_SHARD if count == 1 else f"model-{i + 1:05d}-of-{count:05d}.safetensors"
            (self.path / f"{SINGLE_SHARD}.{i:05d}").rename(self.path / filename)
            weight_map.update(dict.fromkeys(names, filename))
        if count > 1:
            index = {"metadata": {"total_size": self._total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
            _write_json(self.path / INDEX, index)

    def _move_into_place(self) -> None:
        check_output(self._out, None, self._overwrite)
        replacing, aside = self._out.exists(), _free_name(self._out, "old")
        try:
            if replacing:
                self._out.rename(aside)
            self.path.rename(self._out)
            fsync_path(self._out.parent)
        except BaseException:
            if not self.path.exists():
                self._out.rename(self.path)
            if replacing and not self._out.exists():
                aside.rename(self._out)
            raise
        self._finished = True
        if replacing:
            self._remove_replaced(aside)

    @staticmethod
    def _remove_replaced(aside: Path) -> None:
        try:
            shutil.rmtree(aside)
        except OSError as error:
            warnings.warn(f"the replaced checkpoint could not be removed, it is at {aside}: {error}", stacklevel=4)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise

    def _discard(self) -> None:
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
        for parent in self._created_parents:
            with contextlib.suppress(OSError):  # not empty: another program has used it meanwhile
                parent.rmdir()
