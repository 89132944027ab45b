"""Several processes calibrating one model: what they exchange, and how a run ends when one of them fails.

Started by ``torchrun``, or inside a process group that exists already, each process (rank) runs a share of the
calibration text through the blocks. Batches stay whole and are the ones a single process would form, so what a batch
adds to a sum has the same bits wherever it is computed; only the order of the float32 additions between batches
differs. The sums are reduced, the rows of a weight are quantized in shares, and every rank receives every row, so all
go on with the same bits. For a single process each method here returns what it was given.

Every exchange begins with a message over gloo. It carries the failure of a rank, so that all end with its reason, and
it turns a rank that is gone or hangs into an exception, where NCCL, which reduces on GPUs, would take the process down.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields, is_dataclass, replace
from datetime import timedelta
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

__all__ = ["ALONE", "DEFAULT_LIMIT", "LIMIT_VARIABLE", "RankError", "Ranks", "Terminated", "checksum", "join"]
__all__ += ["is_first", "terminable"]

LIMIT_VARIABLE = "LOWBIT_RANK_TIMEOUT"
DEFAULT_LIMIT = 1800
"""Seconds a rank waits for the others in one exchange, unless the environment variable says otherwise."""

_LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_MIN_ROWS = 32  # of a weight per rank: fewer are quantized sooner than sent

T = TypeVar("T")


class RankError(ConnectionError):
    """Another rank failed, ended or does not answer."""


class Terminated(KeyboardInterrupt):
    """SIGTERM: from a shell, a container or a scheduler, or from torchrun when another rank has ended. SIGHUP: from a
    terminal that was closed.
    """

    def __init__(self, message: str, number: int = signal.SIGTERM) -> None:
        super().__init__(message)
        self.status = 128 + number
        """What a shell says of a process that such a signal ended."""


class Moment(Protocol):
    """Running sums over tokens, such as :class:`lowbit.calib.hessian.Hessian`."""

    tokens: int

    @property
    def sums(self) -> list[Tensor]:
        """The sums themselves, added up over the ranks in place."""


@dataclass(frozen=True)
class Ranks:
    """The processes of a run, seen from one of them.

    Attributes:
        rank, count: this process among all.
        local, here: this process among those of the same machine.
        limit: seconds to wait for the others.
        control: group of the messages and of everything in main memory; None for a single process.
        data: group of what lies on GPUs.
    """

    rank: int = 0
    count: int = 1
    local: int = 0
    here: int = 1
    limit: int = DEFAULT_LIMIT
    control: Any = None
    data: Any = None

    def share(self, items: int) -> range:
        """This rank's part of ``items`` in order: contiguous, of sizes that differ by one at most."""
        return _share(items, self.rank, self.count)

    def collect(self, value: T) -> list[T]:
        """Every rank's ``value``, by rank. Pickled: the ranks of one job trust each other.

        Raises:
            RankError: a rank has failed, ended, or does not answer.
        """
        if self.count == 1:
            return [value]
        return [other for _, other in self._meet(None, value)]

    def first(self, make: Callable[[], T]) -> T:
        """What rank 0 makes, on every rank."""
        if self.count == 1:
            return make()
        return self.collect(make() if self.rank == 0 else None)[0]  # type: ignore[return-value]

    def agree(self, facts: Mapping[str, str]) -> None:
        """Refuse to go on unless every rank says the same.

        Raises:
            ValueError: on every rank, with the same text: the first fact that differs, on which rank, and how.
        """
        one, *others = self.collect(dict(facts))
        for rank, other in enumerate(others, start=1):
            for key in dict.fromkeys((*one, *other)):
                if one.get(key) != other.get(key):
                    raise ValueError(
                        f"all ranks must be given the same work, but rank {rank} of {self.count} differs from rank 0 "
                        f"in {key}: {other.get(key, 'none')} instead of {one.get(key, 'none')}"
                    )

    def add_up(self, *moments: Moment | None) -> None:
        """Add up the sums and token counts of every rank, in place; all ranks get the same bits."""
        given = [moment for moment in moments if moment is not None]
        if self.count == 1 or not given:
            return
        counts = self.collect([moment.tokens for moment in given])
        self._reduce(dist.ReduceOp.SUM, [tensor for moment in given for tensor in moment.sums])
        for moment, tokens in zip(given, zip(*counts, strict=True), strict=True):
            moment.tokens = sum(tokens)

    def sum_(self, tensor: Tensor) -> Tensor:
        """``tensor`` added up over the ranks, in place."""
        if self.count > 1:
            self.collect(None)
            self._reduce(dist.ReduceOp.SUM, [tensor])
        return tensor

    def max_(self, tensor: Tensor) -> Tensor:
        """The largest over the ranks, element by element, in place; NaN counts as infinity."""
        if self.count > 1:
            tensor.nan_to_num_(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
            self.collect(None)
            self._reduce(dist.ReduceOp.MAX, [tensor])
        return tensor

    def rows(self, count: int) -> slice:
        """Which rows of a weight of ``count`` this rank computes: its part, or all of a weight too small to share."""
        part = self.share(count) if self._is_shared(count) else range(count)
        return slice(part.start, part.stop)

    def whole(self, part: T, count: int) -> T:
        """What all ranks found for their :meth:`rows`, put together; the same bits everywhere.

        Args:
            part: a tensor that leads with this rank's rows, or a tuple or dataclass of such; what else is in it stays.
            count: rows in all.
        """
        if self.count == 1:
            return part
        if isinstance(part, Tensor):
            return self._whole_tensor(part, count)  # type: ignore[return-value]
        if isinstance(part, tuple):
            return tuple(self.whole(item, count) for item in part)  # type: ignore[return-value]
        if is_dataclass(part) and not isinstance(part, type):
            found = {entry.name: self.whole(getattr(part, entry.name), count) for entry in fields(part)}
            return replace(part, **found)
        return part

    def _whole_tensor(self, part: Tensor, count: int) -> Tensor:
        shared = self._is_shared(count)
        found = torch.empty(count, *part.shape[1:], dtype=part.dtype, device=part.device)
        if shared or self.rank == 0:
            found[self.rows(count)] = part
        self.collect(None)
        with self._exchange():
            for rank in range(self.count if shared else 1):
                sent = _share(count, rank, self.count) if shared else range(count)
                data = found[sent.start : sent.stop].view(torch.uint8)  # no group knows every dtype
                dist.broadcast(data, group=self._group(found), group_src=rank)
        return found

    def _is_shared(self, rows: int) -> bool:
        return rows >= _MIN_ROWS * self.count

    def _group(self, tensor: Tensor) -> Any:
        return self.control if tensor.device.type == "cpu" else self.data

    def _reduce(self, operation: Any, tensors: Sequence[Tensor]) -> None:
        with self._exchange():
            for tensor in tensors:
                dist.all_reduce(tensor, operation, self._group(tensor))

    def _meet(self, failure: str | None, value: Any) -> list[tuple[str | None, Any]]:
        found: list[Any] = [None] * self.count
        with self._exchange():
            dist.all_gather_object(found, (failure, value), group=self.control)
        if failure is None:
            for rank, (other, _) in enumerate(found):
                if other is not None:
                    raise RankError(f"rank {self.rank} of {self.count} stops because rank {rank} failed: {other}")
        return found

    @contextmanager
    def _exchange(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise RankError(
                f"rank {self.rank} of {self.count} stops: another rank has ended, or has not answered for {self.limit} "
                f"seconds ({LIMIT_VARIABLE} sets that limit): {_first_line(error)}"
            ) from error

    @contextmanager
    def telling_failures(self) -> Iterator[None]:
        """An exception that leaves the block is told to the other ranks, whose next exchange raises RankError."""
        try:
            yield
        except RankError:
            raise  # they know
        except Exception as error:
            if self.count > 1:
                with suppress(RankError):
                    self._meet(str(error).strip() or type(error).__name__, None)
            raise


ALONE = Ranks()
"""A process of its own."""


def _share(items: int, rank: int, count: int) -> range:
    return range(items * rank // count, items * (rank + 1) // count)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextmanager
def join(device: str = "cpu") -> Iterator[Ranks]:
    """The ranks this process belongs to while open: of the initialized process group, of the launch, or none others.

    An exception that leaves the block is told to all of them. A group made here is taken down at the end.

    Args:
        device: ``cpu`` or ``cuda``, where sums will lie; every rank must say the same.

    Raises:
        RankError: the other ranks cannot be reached.
        ValueError: an environment that describes no launch, or ranks on different kinds of devices.
    """
    initialized = dist.is_available() and dist.is_initialized()
    rank, count = (dist.get_rank(), dist.get_world_size()) if initialized else _launch()
    if count == 1:
        yield ALONE
        return
    limit = _limit()
    ranks = Ranks(rank, count, limit=limit)
    groups: list[Any] = []  # their type differs from one release of torch to the next
    try:
        with ranks._exchange(), _stdout_kept_free():
            if initialized:
                groups.append(dist.new_group(backend="gloo", timeout=timedelta(seconds=limit)))
            else:
                dist.init_process_group("gloo", **_meeting_point(), timeout=timedelta(seconds=limit))
                groups.append(dist.group.WORLD)
        ranks = replace(ranks, control=groups[0])
        with ranks.telling_failures():
            ranks.agree({"the kind of its device": device})
            hosts = ranks.collect(socket.gethostname())
            mates = [other for other, host in enumerate(hosts) if host == hosts[rank]]
            if device != "cpu":
                with ranks._exchange():
                    groups.append(dist.new_group(backend="nccl", timeout=timedelta(seconds=limit)))
            yield replace(ranks, local=mates.index(rank), here=len(mates), data=groups[-1])
    finally:
        if not initialized and dist.is_initialized():
            dist.destroy_process_group()
        elif initialized:
            for group in groups:
                dist.destroy_process_group(group)


@contextmanager
def _stdout_kept_free() -> Iterator[None]:
    """What is written to stdout goes to stderr: gloo (torch 2.8) says there how many ranks it is connected to."""
    try:
        kept = os.dup(1)
    except OSError:  # a process without a stdout
        yield
        return
    sys.stdout.flush()
    try:
        os.dup2(2, 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


_stores: list[Any] = []


def _meeting_point() -> dict[str, Any]:
    """Arguments of a process group that meets under a new name each time: a store keeps the addresses of those before.

    Every rank joins as often as the others, so they count alike.
    """
    if not _stores:
        _stores.append(next(iter(rendezvous("env://", timeout=timedelta(seconds=_limit())))))
    store, rank, count = _stores[0]
    _stores.append(None)
    fresh = dist.PrefixStore(f"lowbit-{len(_stores)}", store)  # type: ignore[attr-defined]  # not in its __all__
    return {"store": fresh, "rank": rank, "world_size": count}


def _launch() -> tuple[int, int]:
    """Rank and number of ranks as torchrun's environment has them; (0, 1) where nothing was launched."""
    found = {name: os.environ[name] for name in _LAUNCHED if name in os.environ}
    if len(found) < len(_LAUNCHED):
        return 0, 1
    try:
        rank, count = int(found["RANK"]), int(found["WORLD_SIZE"])
    except ValueError:
        rank, count = -1, 0
    if not 0 <= rank < count:
        raise ValueError(
            f"the environment describes no launch of several processes: RANK {found['RANK']!r}, WORLD_SIZE "
            f"{found['WORLD_SIZE']!r}; start them with torchrun, or unset these variables"
        )
    return rank, count


def _limit() -> int:
    text = os.environ.get(LIMIT_VARIABLE, str(DEFAULT_LIMIT))
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise ValueError(f"{LIMIT_VARIABLE} must be a whole number of seconds from 1 on, got {text!r}")
    return int(text)


def is_first() -> bool:
    """Whether this process is the one that prints: rank 0, or the only one."""
    return _launch()[0] == 0


def checksum(tensor: Tensor) -> str:
    """Dtype, shape and the sum of all bit patterns: equal for equal tensors, at the price of reading them once."""
    words = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    total = int(tensor.detach().contiguous().view(words).sum(dtype=torch.int64))
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} checksum {total & (2**64 - 1):016x}"


@contextmanager
def terminable() -> Iterator[None]:
    """While open, SIGTERM and SIGHUP raise :class:`Terminated`, so that a process cleans up behind itself.

    A signal that is ignored stays so: ``nohup`` asks for that. Only the main thread can take a signal: in any other,
    nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    several = _launch()[1] > 1

    def stop(number: int, _: object) -> None:
        if number != signal.SIGTERM:
            raise Terminated("the terminal was closed", number)
        raise Terminated(
            "terminated, as torchrun does with all ranks when one of them has ended" if several else "terminated"
        )

    names = [name for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]  # Windows has no terminals that hang up
    before = {number: signal.getsignal(number) for number in (getattr(signal, name) for name in names)}
    taken = {number: handler for number, handler in before.items() if handler is not signal.SIG_IGN}
    for number in taken:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in taken.items():
            signal.signal(number, handler)
