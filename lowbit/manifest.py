"""``lowbit.json``: what made a checkpoint folder, and the sha256 of every file in it.

    {"lowbit_version": "...", <the caller's record>, "files": {"config.json": {"sha256": "...", "bytes": 719}, ...}}

It is written last, so a folder that has it is complete. Folders written by other tools have none.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

__all__ = [
    "MANIFEST",
    "build_manifest",
    "fsync_path",
    "hash_file",
    "json_text",
    "load_json",
    "parse_json_object",
    "read_manifest",
    "verify_files",
]

MANIFEST = "lowbit.json"

_RESERVED = ("lowbit_version", "files")
_CHUNK = 1 << 20


def hash_file(path: Path) -> str:
    """sha256 of a file in hex, read in chunks of 1 MiB."""
    digest, buffer = hashlib.sha256(), bytearray(_CHUNK)
    view = memoryview(buffer)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(view[:count])
    return digest.hexdigest()


def _hash_files(paths: Iterable[Path]) -> list[str]:
    # hashlib releases the interpreter lock, so threads read and hash shards side by side.
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(hash_file, paths))


def build_manifest(folder: Path, record: Mapping[str, Any], version: str) -> dict[str, Any]:
    """The content of ``lowbit.json`` for a folder whose other files are all in place.

    Args:
        folder: every file below it is hashed.
        record: JSON-able; a float that is not finite is stored as null.
        version: lowbit's.

    Raises:
        ValueError: ``record`` uses a key of the manifest itself.
    """
    taken = sorted(set(record) & set(_RESERVED))
    if taken:
        raise ValueError(f"the record must not have the keys {taken}: lowbit.json uses them itself")
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    files = {
        path.relative_to(folder).as_posix(): {"sha256": digest, "bytes": path.stat().st_size}
        for path, digest in zip(paths, _hash_files(paths), strict=True)
    }
    return {"lowbit_version": version, **_finite(dict(record)), "files": files}


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """``lowbit.json`` of a folder, or None where there is none.

    Raises:
        ValueError: not JSON, or ``files`` is not a table of plain relative names with a sha256 each.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return None
    manifest = load_json(path)
    files = manifest.get("files")
    if not isinstance(files, dict) or not files:
        raise ValueError(f"{path}: 'files' must be a table of file names and hashes, got {type(files).__name__}")
    for name, entry in files.items():
        parts = PurePosixPath(name).parts
        if not parts or name.startswith("/") or "\\" in name or ".." in parts:
            raise ValueError(f"{path}: 'files' names {name!r}, which is not a file inside the folder")
        if not isinstance(entry, dict) or not isinstance(entry.get("sha256"), str):
            raise ValueError(f"{path}: the entry of {name!r} has no sha256, got {entry!r}")
    return manifest


def verify_files(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Compare every file ``lowbit.json`` names with its size and hash.

    Raises:
        ValueError: a named file is missing or its content is not what was written.
    """
    names = sorted(manifest["files"])
    missing = [name for name in names if not (folder / name).is_file()]
    if missing and all(name.endswith(".py") for name in missing):
        raise ValueError(
            f"{folder}: {MANIFEST} names Python files that are missing: {missing[:5]}; code that comes with a model is "
            "fetched from the hub only with --trust-remote-code (trust_remote_code=True)"
        )
    if missing:
        raise ValueError(f"{folder}: {MANIFEST} names files that are missing: {missing[:5]}")
    for name, digest in zip(names, _hash_files(folder / name for name in names), strict=True):
        entry = manifest["files"][name]
        if digest != entry["sha256"]:
            raise ValueError(
                f"{folder / name} is not the file that was written: sha256 {digest}, {MANIFEST} has "
                f"{entry['sha256']} (corrupt, or changed afterwards); where the change is meant, remove {MANIFEST}, "
                "which only lowbit reads"
            )


def json_text(value: Any) -> str:
    """JSON as every file of ours has it: indented, finite numbers only, one newline at the end."""
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def load_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: see :func:`parse_json_object`; names the file.
    """
    try:
        return parse_json_object(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not a readable JSON file: {error}") from None


def parse_json_object(data: bytes) -> dict[str, Any]:
    """A JSON object; what Python's parser lets through silently, a repeated key, is an error.

    Raises:
        ValueError: not UTF-8, not JSON, nested too deeply, a key twice in one object, or not an object.
    """
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_unique_keys)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError(f"must hold a JSON object, got {type(value).__name__}")
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) != len(pairs):
        raise ValueError("the same key stands twice in one object")
    return mapping


def fsync_path(path: Path) -> None:
    """Flush a file or a folder to the disk, so that it survives a power cut once this returns."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
