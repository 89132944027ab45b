"""Free memory goes back to the system when asked for, and by itself once the process has grown by the slack.

And the command that needs much of it runs without glibc's cache of small free chunks.
"""

from __future__ import annotations

import mmap
import os
import sys

import pytest

from lowbit import heap

MB = 1 << 20
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux says how large a process is")


def test_what_is_resident_is_counted_in_bytes():
    with mmap.mmap(-1, 64 * MB) as fresh:  # pages of its own: a bytearray might get some that are resident already
        before = heap.resident_bytes()
        for page in range(0, 64 * MB, mmap.PAGESIZE):
            fresh[page] = 1
        assert 60 * MB < heap.resident_bytes() - before < 80 * MB


def test_nothing_is_returned_until_the_process_has_grown_by_more_than_the_slack_and_nears_its_peak(monkeypatch):
    sizes, returned = [], []
    monkeypatch.setattr(heap, "resident_bytes", lambda: sizes[-1])
    monkeypatch.setattr(heap, "return_free_memory", lambda: returned.append(sizes.append(sizes[-1] - 60)))
    sizes.append(100)
    limit = heap.GrowthLimit(slack=30, margin=10)
    # 131 is the peak, 71 are left after it, then 62: far below the peak, however much it grew, nothing can lower it.
    for size, times in [(130, 0), (131, 1), (101, 1), (121, 1), (122, 2), (92, 2), (121, 2), (140, 3)]:
        sizes.append(size)
        limit.check()
        assert len(returned) == times, size


def test_a_system_that_does_not_say_how_large_a_process_is(monkeypatch):
    def absent(*_):
        raise FileNotFoundError

    monkeypatch.setattr(os, "open", absent)
    assert heap.resident_bytes() == 0


# --- glibc's cache


@pytest.fixture
def restarted(monkeypatch):
    """The calls of os.execve, which would not return, in a process that was started without GLIBC_TUNABLES."""
    calls = []
    monkeypatch.setattr(os, "execve", lambda *call: calls.append(call))
    monkeypatch.setattr(os, "confstr", lambda number: "glibc 2.36")
    monkeypatch.setattr(sys, "gettrace", lambda: None)
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    return calls


def test_the_same_command_line_is_started_again_with_the_cache_off(restarted):
    heap.restart_without_cache()
    [(path, arguments, environment)] = restarted
    assert path == arguments[0] == sys.executable and arguments[1:] == sys.orig_argv[1:]
    assert environment == {**os.environ, "GLIBC_TUNABLES": "glibc.malloc.tcache_count=0"}


@pytest.mark.parametrize("why", ["restarted", "set by the user", "another C library", "a debugger", "another system"])
def test_a_process_that_gains_nothing_is_not_restarted(restarted, monkeypatch, why):
    if why == "restarted":
        monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.tcache_count=0")
    elif why == "set by the user":
        monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.arena_max=1")
    elif why == "another C library":
        monkeypatch.setattr(os, "confstr", lambda number: None)
    elif why == "a debugger":
        monkeypatch.setattr(sys, "gettrace", lambda: print)
    else:
        monkeypatch.setattr(sys, "platform", "darwin")
    heap.restart_without_cache()
    assert restarted == []
