"""The progress bar: on stderr, and nothing but a bar."""

import subprocess
import sys
from pathlib import Path

import pytest

from lowbit.progress import track

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("enabled", [True, False])
def test_items_pass_through_in_order_and_stdout_stays_empty(capsys, enabled):
    assert list(track(iter("abc"), "spelling [b]", total=3, enabled=enabled)) == ["a", "b", "c"]
    out, err = capsys.readouterr()
    assert out == ""
    assert ("spelling [b]" in err and "3/3" in err) is enabled


def test_an_error_in_the_loop_is_the_callers_and_ends_the_bar(capsys):
    with pytest.raises(KeyError, match="ours"):
        for item in track([1, 2], "first"):
            raise KeyError("ours", item)
    assert list(track([1], "second")) == [1]
    assert "second" in capsys.readouterr().err


def test_a_disabled_bar_imports_nothing():
    code = "import sys; from lowbit.progress import track; [*track('a', 'x', enabled=False)]"
    code += "; assert 'rich' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)
