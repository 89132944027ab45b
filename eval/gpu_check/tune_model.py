"""How long a matmul should take, from bytes, instructions and tensor core operations: what predicted tables stand on.

Every figure of a chip here is an assumption to compute with, taken from a datasheet or from measurements named beside
it; none is a result. scripts/tune replaces a predicted table by a measured one.

    time = max(memory, instructions, tensor cores) / share of the last wave that is busy + launch + reduction

The dense layer and the floor (dequantise in column chunks that stay in the L2, then cuBLAS) are predicted the same way.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from lowbit_kernels.scaled_plan import steps_taken
from lowbit_kernels.tiles import Problem, Tile, cdiv, shared_bytes, shared_limit, step_columns

__all__ = ["CHIPS", "Chip", "Prediction", "predict", "predict_dense", "predict_int8"]

LAUNCH = 2.0e-6
"""Seconds per kernel within a CUDA graph, ramp up and down included (research: 2 to 2.5 us)."""
PDL_LAUNCH = 1.0e-6
"""The same where a launch begins while the one before ends (lowbit_kernels/overlap.py): a guess."""
LATENCY = 0.8e-6
"""Seconds from a request to memory to its data, under load."""
REDUCTION = 1.5e-6
"""Seconds that the last program of a split tile spends on the others' sums, beside their bytes."""
L2_OVER_MEMORY = 1.5
"""Bandwidth of the L2 over that of a copy through memory, both ways; a guess that is low for most chips."""
CHUNK_BYTES = 24 << 20
"""Unpacked weights that the dequant family holds in the L2 (lowbit_kernels/prefill.py)."""
EFFICIENCY = {"triton": 0.60, "gluon": 0.75, "scaled": 0.90, "dequant": 0.97, "dense": 1.0}
"""Share of cuBLAS's rate that a family's tensor core instructions reach; a guess until it is measured."""
INT8_EFFICIENCY = {"triton": 0.85, "gluon": 0.95}
"""The same of the library's int8 rate."""
SLOTS_PER_WEIGHT = {2: 1.9, 4: 1.9, 8: 2.4}
"""Instruction slots of a lane per weight and token tile: research 2.8 (1.6 to 2 at 4 bits), 8 bits from the gate."""


@dataclass(frozen=True)
class Chip:
    """What a prediction assumes of a GPU.

    Attributes:
        name: the driver's name, or ``sm_90`` for whatever has no table of its own.
        arch: 10 * major + minor.
        multiprocessors: number of them.
        bandwidth: bytes per second that a copy reaches, read and written bytes counted together.
        tflops: dense 16-bit matmul rate that cuBLAS reaches.
        int8_tops: the same for int8.
        clock: Hz under load.
        origin: where these figures are from.
    """

    name: str
    arch: int
    multiprocessors: int
    bandwidth: float
    tflops: float
    int8_tops: float
    clock: float
    origin: str


_DATASHEET = "datasheet: 85 % of the bandwidth and 75 % of the matrix rate"
CHIPS = (
    Chip("NVIDIA H200", 90, 132, 4.3e12, 790, 1390, 1.755e9, "copy and bf16 matmul measured on H200s; int8 assumed"),
    Chip("sm_80", 80, 108, 1.32e12, 234, 468, 1.41e9, f"A100 40 GB, {_DATASHEET}"),
    Chip("sm_86", 86, 84, 0.59e12, 112, 224, 1.74e9, f"A40, {_DATASHEET}"),
    Chip("sm_89", 89, 142, 0.73e12, 271, 543, 2.49e9, f"L40S, {_DATASHEET}"),
    Chip("sm_90", 90, 132, 2.85e12, 742, 1484, 1.755e9, f"H100 SXM, {_DATASHEET}"),
    Chip("sm_100", 100, 148, 6.8e12, 1687, 3375, 1.85e9, f"B200, {_DATASHEET}"),
    Chip("sm_120", 120, 170, 1.52e12, 157, 314, 2.4e9, f"RTX 5090, {_DATASHEET}"),
)


@dataclass(frozen=True)
class Prediction:
    """Seconds and what they come from, each term in seconds; ``bytes`` through the memory."""

    seconds: float
    memory: float
    issue: float
    tensor: float
    bytes: float
    bound: str


def predict(tile: Tile, problem: Problem, chip: Chip) -> Prediction:
    """A lowbit family on ``problem`` with a resolved split_k."""
    m, n, k = problem.m, problem.n, problem.k
    groups = 1 if problem.group_size == -1 else k // problem.group_size
    moved = n * k * problem.bits / 8 + n * groups * (2 + problem.asymmetric) + 2 * m * (k + n)
    if tile.family == "dequant":
        return _predict_dequant(moved, problem, chip)
    if tile.family == "scaled":
        return _predict_scaled(tile, moved, problem, chip)
    programs = cdiv(m, tile.block_m) * cdiv(n, tile.block_n) * tile.split_k
    resident = _resident(tile, problem, chip)
    step = step_columns(problem.bits)
    in_flight = (
        min(programs, resident * chip.multiprocessors) * tile.num_stages * tile.block_n * step * problem.bits / 8
    )
    # every tile of tokens reads the weights again, every tile of rows the activations: out of the L2
    again = n * k * problem.bits / 8 * cdiv(m, tile.block_m) + 2 * m * k * cdiv(n, tile.block_n)
    memory = max(moved / min(chip.bandwidth, in_flight / LATENCY), again / (L2_OVER_MEMORY * chip.bandwidth))
    padded_m = cdiv(m, tile.block_m) * tile.block_m
    slots = chip.multiprocessors * 4 * 32 * chip.clock
    issue = n * k * cdiv(m, tile.block_m) * SLOTS_PER_WEIGHT[problem.bits] / slots
    tensor = 2 * padded_m * n * k / (chip.tflops * 1e12 * EFFICIENCY[tile.family])
    waves = programs / (resident * chip.multiprocessors)
    busy = waves / math.ceil(waves) if waves > 1 else 1.0
    # fewer programs than multiprocessors leave their instruction and tensor units idle
    used = min(1.0, programs / chip.multiprocessors)
    work = max(memory, issue / used, tensor / used) / busy
    launch = PDL_LAUNCH if tile.pdl else LAUNCH
    reduction = REDUCTION + 8 * tile.split_k * padded_m * n / chip.bandwidth if tile.split_k > 1 else 0.0
    return _prediction(work + launch + reduction, memory, issue / used, tensor / used, moved)


def predict_dense(problem: Problem, chip: Chip) -> Prediction:
    """cuBLAS on the 16-bit weight."""
    m, n, k = problem.m, problem.n, problem.k
    moved = 2.0 * (n * k + m * (k + n))
    memory, tensor = moved / chip.bandwidth, 2 * m * n * k / (chip.tflops * 1e12)
    return _prediction(max(memory, tensor) + LAUNCH, memory, 0.0, tensor, moved)


def predict_int8(problem: Problem, chip: Chip, family: str = "triton", *, pdl: bool = False) -> Prediction:
    """W8A8: one kernel that quantizes the activations, one int8 matmul."""
    m, n, k = problem.m, problem.n, problem.k
    launch = PDL_LAUNCH if pdl else LAUNCH
    quantizing = 3.0 * m * k / chip.bandwidth + launch
    moved = n * k + m * k + 2.0 * m * n
    memory, tensor = moved / chip.bandwidth, 2 * m * n * k / (INT8_EFFICIENCY[family] * chip.int8_tops * 1e12)
    return _prediction(max(memory, tensor) + launch + quantizing, memory, 0.0, tensor, moved)


def _predict_scaled(tile: Tile, moved: float, problem: Problem, chip: Chip) -> Prediction:
    """Programs that stay: steps of the busiest one, each as long as its slowest part, and a launch to narrow x before.

    A tile of 64 tokens converts twice as many weights per product as one of 128, and gets 8/9 of the rate for it.
    """
    m, n, k = problem.m, problem.n, problem.k
    count = cdiv(m, tile.block_m) * cdiv(n, tile.block_n)
    taken, share = steps_taken(count, cdiv(k, 128), tile.split_k, chip.multiprocessors)
    rate = chip.tflops * 1e12 * EFFICIENCY["scaled"] * (8 / 9 if tile.block_m < 128 else 1.0) / chip.multiprocessors
    tensor = taken * 2 * tile.block_m * tile.block_n * 128 / rate
    issue = taken * tile.block_n * 128 * SLOTS_PER_WEIGHT[problem.bits] / (4 * 32 * chip.clock)
    again = count * cdiv(k, 128) * (tile.block_m * 256 + tile.block_n * 16 * problem.bits)
    memory = max(moved / chip.bandwidth, again / (L2_OVER_MEMORY * chip.bandwidth))
    launch = PDL_LAUNCH if tile.pdl else LAUNCH
    seconds = max(memory, issue, tensor) + launch
    if share > 1:  # sums of a tile are stored by each and read by one
        seconds += REDUCTION + (1 + share) * 4 * tile.block_m * tile.block_n / (
            L2_OVER_MEMORY * chip.bandwidth / chip.multiprocessors
        )
    if problem.group_size != -1 or problem.dtype == torch.bfloat16:
        seconds += launch + 4.0 * m * k * (problem.dtype == torch.bfloat16) / chip.bandwidth
    return _prediction(seconds, memory, issue, tensor, moved)


def _predict_dequant(moved: float, problem: Problem, chip: Chip) -> Prediction:
    """Chunks in the L2: words from memory, 16-bit weights written to it and read back, a matmul per chunk.

    A chunk's matmul of few tokens has too few tiles (128 by 64) for all multiprocessors: the rest of them idle.
    """
    m, n, k = problem.m, problem.n, problem.k
    rows = max(1, CHUNK_BYTES // (2 * k))
    chunks = cdiv(n, rows)
    through_l2 = 2.0 * n * k / (L2_OVER_MEMORY * chip.bandwidth)
    unpack = max(moved / chip.bandwidth, through_l2)
    waves = cdiv(m, 128) * cdiv(min(rows, n), 64) / chip.multiprocessors
    tensor = 2 * m * n * k / (chip.tflops * 1e12 * EFFICIENCY["dequant"]) * (math.ceil(waves) / waves)
    seconds = unpack + max(tensor, through_l2) + 2 * chunks * LAUNCH
    if problem.dtype == torch.bfloat16:  # through float16: x, and each chunk of the result while it is in the L2
        seconds += 4 * m * k / chip.bandwidth + 4 * m * n / (L2_OVER_MEMORY * chip.bandwidth) + (1 + chunks) * LAUNCH
    return _prediction(seconds, unpack, 0.0, tensor, moved)


def _resident(tile: Tile, problem: Problem, chip: Chip) -> int:
    """Programs on one multiprocessor: shared memory, and 16 warps at up to 128 registers per thread."""
    by_memory = shared_limit(chip.arch) // max(1, shared_bytes(tile, problem))
    return max(1, min(by_memory, 16 // tile.num_warps))


def _prediction(seconds: float, memory: float, issue: float, tensor: float, moved: float) -> Prediction:
    terms = {"memory": memory, "instructions": issue, "tensor cores": tensor}
    return Prediction(seconds, memory, issue, tensor, moved, max(terms, key=lambda name: terms[name]))
