"""One run of scripts/tune on a GPU: cases in order, each kept as it ends, and the table of what there is at the end.

A tile that cannot be launched, gives a wrong result or takes the device with it is left out of its case and named; the
run goes on where it can, --resume where it cannot, and ends with exit status 1.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from check_device import NoGpu, about, require_gpu, without_gluon
from check_store import Store
from check_time import chip_limits
from check_warm import warm
from check_watch import HUNG_S, ContextLost, raise_if_lost, watched
from tune_experts import ExpertCase
from tune_main import ANY, DONE, FAILED, STOPPED, USAGE, Case, make_table, plan, work
from tune_predict import TABLES, table_file, to_text

__all__ = ["Tuning", "tune"]


def tune(options: argparse.Namespace) -> int:
    """Measure what is missing, write the table; the exit status."""
    try:
        device = require_gpu()
        store = Store(options.out, about(device, tables=False), resume=options.resume)
    except (NoGpu, FileExistsError, ValueError) as error:
        print(f"scripts/tune: {error}", file=sys.stderr)
        return USAGE
    if store.stale:
        _say(f"{store.stale} records of other sources or another machine are left alone")
    options.without = without_gluon(options.without)
    return Tuning(options, store, torch.cuda.get_device_properties(device).multi_processor_count).all()


class Tuning:
    """The cases of one run.

    Args:
        options: of tune_main.parse.
        store: where results go, and which are there already.
        multiprocessors: of the GPU.
    """

    def __init__(self, options: argparse.Namespace, store: Store, multiprocessors: int) -> None:
        self.options, self.store, self.count = options, store, multiprocessors
        self.arch: int = store.about["arch"]
        self.deadline = time.monotonic() + 60 * options.minutes
        self._trying: str | None = None  # case and tile that are under way

    def all(self) -> int:
        """Every case that is missing, then the table; the exit status."""
        dtype = torch.bfloat16 if self.arch >= 80 else torch.float16
        _say(plan(self.options, self.arch, self.count, dtype))
        if not self.store.has("limits", "copy"):
            self.store.add("limits", "copy", {"bytes_per_s": chip_limits()["copy_bytes_per_s"]})
        todo = [case for case in work(self.options, self.arch, self.count, dtype) if not self.store.has(*case.key)]
        known = [case for case in todo if self.store.has("failed", case.key[1])]
        for case in known:
            _say(f"left out, failed before: {case.key[1]}")
        finished, lost = False, False
        try:
            finished = all(self.measured(part) for part in parts([case for case in todo if case not in known]))
        except ContextLost as error:
            _say(f"FAILED: {error}; --resume goes on without it")
            lost = True
        if not finished and not lost:
            _say(f"stopped after {self.options.minutes:g} minutes; --resume goes on")
        return self.write() or (FAILED if lost or self._failures() else DONE if finished else STOPPED)

    def measured(self, part: Sequence[Case | ExpertCase]) -> bool:
        """Compile for these cases and measure them; False when the deadline came before the last."""
        if part and time.monotonic() < self.deadline:
            start = time.monotonic()
            jobs = list(dict.fromkeys(job for case in part for job in case.jobs(self.arch)))
            _say(f"{warm(jobs)} of {len(jobs)} kernels compiled ahead in {time.monotonic() - start:.0f} s")
        for case in part:
            if time.monotonic() > self.deadline:
                return False
            self._case(case)
        return True

    def write(self) -> int:
        """The table of what has been measured, if that is enough for one; DONE, or STOPPED where it is not."""
        about, copy = self.store.about, self.store.records("limits")[0]["bytes_per_s"]
        try:
            made = make_table(self.store, about, self.count, copy, asked=self.options.bits)
        except ValueError as reason:
            _say(f"no table yet: {reason}")
            return FAILED if self._failures() else STOPPED
        path = self.options.out / table_file(about["gpu"])
        path.write_text(to_text(made), encoding="utf-8")
        print(f"{path}: {len(made['rows'])} rows; below the dense layer: {len(made['about']['below_dense'])} cases")
        for record in self._failures():
            print(f"not among them: {record['case']}: {record['text']}")
        if self.options.install:
            beside = TABLES / f".{path.name}.{os.getpid()}"
            beside.write_text(to_text(made), encoding="utf-8")
            os.replace(beside, TABLES / path.name)  # never half a table, whenever it is read
            print(f"installed as {TABLES / path.name}")
        return DONE

    def _case(self, case: Case | ExpertCase) -> None:
        """Measure one case; what fails is kept as failed. ContextLost when nothing more can be measured."""
        try:
            with watched(HUNG_S, partial(self._hung, case.key[1])):
                _say(case.measure(self.store, self._attempt))
        except ContextLost:
            raise
        except Exception as error:  # whatever a kernel raises
            traceback.print_exc()
            self._fail(case.key[1], f"{type(error).__name__}: {error}")
            raise_if_lost(case.key[1])

    def _attempt(self, case: str, tile: Any, make: Callable[[], Callable[[], float]]) -> Callable[[], float] | None:
        """A tile's timer; None where it raised, now or in a run that this one goes on with.

        Raises:
            ContextLost: nothing more can be measured.
        """
        name = f"{case}, {tile!r}"
        if self.store.has("failed", name):
            return None
        self._trying = name
        try:
            return make()
        except Exception as error:  # whatever a kernel raises
            self._fail(name, f"{type(error).__name__}: {error}")
            raise_if_lost(name)
        finally:
            self._trying = None
        return None

    def _fail(self, what: str, reason: str) -> None:
        _say(f"FAILED {what}: {reason[:1000]}")
        self.store.add("failed", what, {"text": reason[:1000]})

    def _failures(self) -> list[dict[str, Any]]:
        return self.store.records("failed")

    def _hung(self, case: str) -> None:
        self._fail(self._trying or case, f"not finished in {HUNG_S} s")
        self.write()
        sys.stdout.flush()
        os._exit(FAILED)


def parts(todo: Sequence[Case | ExpertCase]) -> list[list[Case | ExpertCase]]:
    """What stands for any shape, the experts, and the rest: each is measured before the next is compiled."""
    first = [case for case in todo if isinstance(case, Case) and (case.problem.n, case.problem.k) == ANY]
    experts = [case for case in todo if isinstance(case, ExpertCase)]
    return [[*first], [*experts], [case for case in todo if case not in first and case not in experts]]


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
