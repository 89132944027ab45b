"""Free memory goes back to the system when asked for, and by itself once the process has grown by the slack."""

from __future__ import annotations

import mmap
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


def test_nothing_is_returned_until_the_process_has_grown_by_more_than_the_slack_and_to_a_new_peak(monkeypatch):
    sizes, returned = [], []
    monkeypatch.setattr(heap, "resident_bytes", lambda: sizes[-1])
    monkeypatch.setattr(heap, "return_free_memory", lambda: returned.append(sizes.append(sizes[-1] - 20)))
    sizes.append(100)
    limit = heap.GrowthLimit(50)
    # After the first 131 are left, after the second 182: what is below the peak, however much it grew, cannot lower it.
    for size, times in [(150, 0), (151, 1), (140, 1), (181, 1), (202, 2), (110, 2), (200, 2), (202, 2), (233, 3)]:
        sizes.append(size)
        limit.check()
        assert len(returned) == times, size


def test_a_system_that_does_not_say_how_large_a_process_is(monkeypatch):
    def absent(*_):
        raise FileNotFoundError

    monkeypatch.setattr("builtins.open", absent)
    assert heap.resident_bytes() == 0
