"""Models to refuse, places to write to, and a command that must leave both as they are.

Whatever is wrong ends as one message and exit status 2 (130 for Ctrl-C); nothing is left at OUT, nothing is changed.
Every case towards an OUT runs twice: towards a new folder, and with ``--overwrite`` towards a folder that must survive.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import lowbit
from lowbit.cli import main
from refusals import one_message, tree
from tiny_models import tiny_folder


@pytest.fixture(scope="session")
def pristine(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("pristine") / "model")


@pytest.fixture(scope="session")
def packed(pristine, tmp_path_factory):
    """A packed folder of ours."""
    out = tmp_path_factory.mktemp("packed") / "model"
    lowbit.quantize(pristine, out, group_size=32, method="rtn", verbose=False)
    return out


@pytest.fixture
def model(pristine, tmp_path):
    """A copy a test may damage; OUT is to appear beside it."""
    return Path(shutil.copytree(pristine, tmp_path / "model"))


@pytest.fixture(params=["new", "existing"])
def out(request, tmp_path):
    """Where the result is to go: nothing is there yet, or a model that may be overwritten."""
    path = tmp_path / "results" / "out"
    path.parent.mkdir()
    if request.param == "existing":
        path.mkdir()
        (path / "config.json").write_text('{"an": "older result"}')
    return path


@pytest.fixture
def refused(capfd, tmp_path):
    """Runs a command that must fail before it changes anything; returns its message."""

    def run(command, *, before_work=True):
        before = tree(tmp_path)
        status = main(command)
        captured = capfd.readouterr()
        assert status == 2
        if before_work:
            assert captured.err.startswith("lowbit: error: "), "no plan, no progress"
        message = one_message(captured.out, captured.err)
        assert tree(tmp_path) == before, "neither a folder at OUT or beside it, nor a changed input"
        return message

    return run
