"""One run of scripts/gpu_check: its parts in order, each case kept as it ends, time watched between cases."""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from check_correct import checks
from check_layers import random_packed
from check_report import write_all
from check_store import Store
from check_watch import HUNG_S, ContextLost, raise_if_lost, watched

__all__ = ["OutOfTime", "Run", "plan"]

DONE, FAILED, STOPPED = 0, 1, 3
MODEL_S = 90
"""Seconds that a model needs at least: with less left it is not begun."""


class OutOfTime(Exception):
    """The limit was reached between two cases."""


class CaseFailed(Exception):
    """A case raised; it has been recorded and printed."""


def plan(options: argparse.Namespace) -> str:
    """What a run with these options would do, one line per part."""
    from check_measure import MODES, TOKENS, points

    lines = ["correct: every family, dtype and check; nothing is measured unless all pass"]
    for mode in MODES:
        if mode in options.parts and not options.interpret:
            cases = sum(point.mode == mode for point in points())
            lines.append(
                f"{mode}: {cases} cases, M = {', '.join(map(str, TOKENS))}, layers 70b and 8b, four linears each"
            )
    others = {
        "limits": "copy bandwidth, bf16 and int8 matmul rate",
        "cold": "single calls with a cold L2",
        "host": "host microseconds per call, with and without a graph",
        "sanitizer": "compute-sanitizer memcheck and racecheck on small launches, where installed",
        "model": "a Llama-3-8B-shaped model: eval/bench_generate.py",
    }
    if not options.interpret:
        lines += [f"{part}: {text}" for part, text in others.items() if part in options.parts]
        lines.append(f"peers, where installed: {', '.join(options.peers) or 'none'}")
        lines.append(f"stops before a case that would begin after {options.minutes:g} minutes; --resume goes on")
    return "\n".join(lines)


class Run:
    """The parts of one run.

    Args:
        options: of check_main.parse.
        store: where results go, and which are there already.
        device: what to run on; the CPU for the interpreter.
        deadline: time.monotonic() after which no case begins.
    """

    def __init__(self, options: argparse.Namespace, store: Store, device: torch.device, deadline: float) -> None:
        self.options, self.store, self.device, self.deadline = options, store, device, deadline
        self.arch: int = store.about["arch"]
        self._failed = False  # something that the rest of the run does not depend on
        self._said: set[str] = set()

    def all(self) -> int:
        """Every part asked for; the exit status. The report is written however it ends."""
        status = DONE
        if self.store.stale:
            self.say(f"{self.store.stale} records of other sources or another machine are left alone")
        parts: dict[str, Callable[[], None]] = {
            "limits": self.limits,
            "w4a16": lambda: self.mode("w4a16"),
            "w8a16": lambda: self.mode("w8a16"),
            "w8a8": lambda: self.mode("w8a8"),
            "cold": self.cold,
            "host": self.host,
            "sanitizer": self.sanitizer,
            "model": self.model,
        }
        try:
            if self.device.type == "cuda":
                self.warm()
            self.correct()
            for name in () if self.options.interpret else self.options.parts:
                if name != "correct":
                    parts[name]()
        except OutOfTime:
            self.say(f"stopped after {self.options.minutes:g} minutes; --resume goes on")
            status = STOPPED
        except CaseFailed:
            status = FAILED
        except ContextLost as error:
            self.say(f"FAILED: {error}; the rest was not run. --without leaves a family out, --peers a peer")
            status = FAILED
        finally:
            print(write_all(self.store, self.options.out), flush=True)
        return status or (FAILED if self._failed else DONE)

    def say(self, text: str) -> None:
        """A line for whoever watches, each once."""
        if text not in self._said:
            self._said.add(text)
            print(text, file=sys.stderr, flush=True)

    def warm(self) -> None:
        """Compile in parallel what the parts to come will launch; and what peers compile, which takes its time."""
        from check_measure import work_of_points
        from check_overlap import overlap_work
        from check_peers import prepare
        from check_warm import jobs_of, rehearsals, warm

        start, tiny, without = time.monotonic(), self.options.tiny, self.options.without
        chains = [w for size in {tiny, True} for w in overlap_work(torch.bfloat16, self.arch, tiny=size)]
        work = [*chains, *work_of_points(self.options.parts, self.arch, self.store.about["gpu"], tiny=tiny)]
        wanted = (i for i in work if i[1].family not in without and not (i[1].pdl and "pdl" in without))
        jobs = [*jobs_of(wanted, self.arch), *rehearsals(self.arch, tiny, without)]
        self.say(f"{warm(jobs)} kernels compiled ahead in {time.monotonic() - start:.0f} s")
        prepare(self.options.peers if not {"w4a16", "w8a16"}.isdisjoint(self.options.parts) else ())

    def correct(self) -> None:
        """The suite. All checks run, so that one failure does not hide another; any failure ends the run."""
        failed = []
        tiny = self.options.tiny or self.options.interpret
        for check in checks(self.device, self.arch, tiny=tiny, without=self.options.without):
            if self.store.has("correct", check.name) and self._passed(check.name):
                continue
            self._in_time()
            try:
                with self._watched(check.name):
                    result = {"ok": True, "figure": check.run()}
            except MemoryError as reason:
                result = {"ok": True, "figure": f"not run: {reason}"}
            except Exception as error:  # whatever a kernel raises is a failed check
                result = {"ok": False, "figure": f"{type(error).__name__}: {error}"[:1000]}
                if not isinstance(error, AssertionError):
                    traceback.print_exc()
                failed.append(check.name)
                self.say(f"FAILED {check.name}: {result['figure']}")
            self.store.add("correct", check.name, result)
            if not result["ok"]:
                raise_if_lost(check.name)
        if failed:
            raise CaseFailed
        self.say(f"{len(self.store.records('correct'))} checks passed")

    def limits(self) -> None:
        """What this chip does at best, in this run."""
        from check_time import chip_limits

        for case in self._cases("limits", "chip"):
            found = chip_limits(512 if self.options.tiny else 8192)
            text = (
                f"copy {found['copy_bytes_per_s'] / 1e9:.0f} GB/s, bf16 {found['bf16_flops'] / 1e12:.0f} TFLOP/s, "
                f"int8 {found['int8_ops'] / 1e12:.0f} TOP/s"
            )
            self.store.add("limits", case, {**found, "text": text})

    def mode(self, mode: str) -> None:
        """One of w4a16, w8a16, w8a8."""
        from check_measure import measure, points

        for point in points((mode,), tiny=self.options.tiny):
            for case in self._cases(mode, point.case):
                contestants = (self.options.peers, self.options.without)
                with self._watched(case):
                    self._keep(
                        mode, case, partial(measure, point, self.arch, self.store.about["gpu"], *contestants, self.say)
                    )

    def cold(self) -> None:
        """Single calls of the 8B layer's linears at M = 1, L2 cold, launch included."""
        from check_layers import LAYERS, TINY_LAYERS
        from check_time import cold_call

        for linear in (TINY_LAYERS if self.options.tiny else LAYERS)["8b"]:
            for case in self._cases("cold", f"w4a16 8b {linear.name} M=1"):
                packed = random_packed(linear.n, linear.k, 4, 128, torch.bfloat16, self.device)
                x = torch.randn(1, linear.k, device=self.device).to(torch.bfloat16)
                dense = torch.randn(linear.n, linear.k, device=self.device).to(torch.bfloat16)
                ours = cold_call(partial(packed, x))
                theirs = cold_call(partial(torch.nn.functional.linear, x, dense))
                text = f"{ours * 1e6:.1f} us, cuBLAS bf16 {theirs * 1e6:.1f} us"
                self.store.add("cold", case, {"ours": ours, "cublas": theirs, "text": text})

    def host(self) -> None:
        """Host time per call on a layer so small that the host is the limit, and the same in a graph."""
        from check_time import GraphTimer, host_seconds

        for case in self._cases("host", "w4a16 512x512 M=1"):
            packed = random_packed(512, 512, 4, 128, torch.bfloat16, self.device)
            x = torch.randn(1, 512, device=self.device).to(torch.bfloat16)
            dense = torch.randn(512, 512, device=self.device).to(torch.bfloat16)
            ours, linear = partial(packed, x), partial(torch.nn.functional.linear, x, dense)
            found = {
                "call": host_seconds(ours),
                "linear": host_seconds(linear),
                "in_graph": GraphTimer([ours] * (4 if self.options.tiny else 100))(),
            }
            text = (
                f"{found['call'] * 1e6:.1f} us per call, torch's linear {found['linear'] * 1e6:.1f} us, "
                f"in a graph {found['in_graph'] * 1e6:.2f} us"
            )
            self.store.add("host", case, {**found, "text": text})

    def sanitizer(self) -> None:
        """compute-sanitizer in a process of its own. What it reports is for somebody to read: the run goes on."""
        from check_machinery import SANITIZE_S, sanitize

        for tool in ("memcheck", "racecheck"):
            for case in self._cases("sanitizer", tool):
                left = self.deadline - time.monotonic()
                try:
                    ok, text = sanitize(tool, self.options.without, min(SANITIZE_S, left))
                except subprocess.TimeoutExpired as error:
                    if left < SANITIZE_S:
                        raise OutOfTime from error
                    ok, text = True, f"{tool}: not finished in {SANITIZE_S} s"
                self.store.add("sanitizer", case, {"ok": ok, "text": text})
                if not ok:
                    self.say(f"FAILED sanitizer, {text}")
        self._failed |= not all(record["ok"] for record in self.store.records("sanitizer"))

    def model(self) -> None:
        """Tokens per second of a whole model, by eval/bench_generate.py in a process of its own."""
        from check_model import bench_generate

        for weights in ("bf16", "w4", "w8"):
            for case in self._cases("model", weights, MODEL_S):
                left = self.deadline - time.monotonic()
                shape = "tiny" if self.options.tiny else "llama-3-8b"
                try:
                    self._keep("model", case, partial(bench_generate, shape, weights, left))
                except subprocess.TimeoutExpired as error:
                    raise OutOfTime from error

    def _cases(self, part: str, case: str, needs: float = 0.0) -> Iterator[str]:
        """The case, unless it is done; raises OutOfTime when it is too late to begin it."""
        if not self.store.has(part, case):
            self._in_time(needs)
            yield case

    def _keep(self, part: str, case: str, make: Callable[[], Mapping[str, Any]]) -> None:
        try:
            self.store.add(part, case, make())
        except (ContextLost, subprocess.TimeoutExpired):
            raise
        except Exception as error:
            traceback.print_exc()
            self.say(f"FAILED {part}, {case}: {type(error).__name__}: {error}")
            raise_if_lost(case)
            raise CaseFailed from error

    def _watched(self, case: str) -> contextlib.AbstractContextManager[None]:
        """End the process when a case does not: a kernel that waits for ever cannot be interrupted otherwise."""
        return watched(HUNG_S, partial(self._hung, case))

    def _hung(self, case: str) -> None:
        self.say(f"FAILED {case}: not finished in {HUNG_S} s")
        self.store.add("hung", case, {"text": f"not finished in {HUNG_S} s"})
        print(write_all(self.store, self.options.out), flush=True)
        os._exit(FAILED)

    def _in_time(self, needs: float = 0.0) -> None:
        if time.monotonic() + needs > self.deadline:
            raise OutOfTime

    def _passed(self, name: str) -> bool:
        return any(record["case"] == name and record["ok"] for record in self.store.records("correct"))
