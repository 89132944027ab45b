"""What the kernels' host code hands to a launch besides its arguments: counters, strides, settings of torch."""

import threading

import pytest
import torch

import gpu_check_modules  # noqa: F401

pytest.importorskip("triton", reason="triton is not installed (it exists for Linux only)")

from check_correct import _shapes
from check_layers import random_packed, reference, relative_rms

from fake_gpu import _Placing, fake_gpu
from helpers import needs_gluon
from lowbit_kernels import epilogue, prefill
from lowbit_kernels.int8 import int8_matmul
from lowbit_kernels.int8_tiles import HOPPER_TILES
from lowbit_kernels.tiles import Tile

CUDA = torch.device("cuda")
BF16 = torch.bfloat16


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(epilogue, "_counters", {})
    monkeypatch.setattr(epilogue, "_next", {})
    with fake_gpu() as made:
        yield made


# --- counters


def test_counters_are_not_made_inside_a_capture(gpu):
    """Their zeros would be part of the graph, and there only once it replays."""
    with torch.cuda.graph(torch.cuda.CUDAGraph()), pytest.raises(RuntimeError, match="before a capture"):
        epilogue.workspace(7, 2, 4, CUDA)
    epilogue.prepare(CUDA)
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        counters = epilogue.workspace(7, 2, 4, CUDA)[1]
    assert not counters.any()


def test_counters_that_lost_their_memory_are_zero_again(gpu):
    epilogue.prepare(CUDA)
    epilogue.workspace(7, 2, 4, CUDA)[1].fill_(3)
    epilogue.prepare(CUDA)
    assert epilogue._counters[CUDA].any(), "another layer's preparation leaves them to the kernels that run"
    epilogue.prepare(CUDA, reset=True)
    assert not epilogue._counters[CUDA].any()


def test_threads_get_counters_of_their_own(gpu):
    epilogue.prepare(CUDA)
    begins, start = [], threading.Barrier(4)

    def take():
        with _Placing():  # modes are a thread's own
            start.wait()
            begins.extend(epilogue.workspace(5, 2, 4, CUDA)[1].data_ptr() for _ in range(200))

    threads = [threading.Thread(target=take) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(begins)) == len(begins) == 800


# --- strides


@needs_gluon()
@pytest.mark.parametrize("tile", [Tile("gluon", 16, 128, 1, 4, 2), Tile("scaled", 64, 128, 1, 8, 3)], ids=str)
def test_one_row_may_have_any_stride(gpu, tile):
    """torch calls a row of a wider tensor contiguous, and keeps the stride; the copy engine wants multiples of 16."""
    packed = random_packed(64, 256, 4, 128, BF16, CUDA)
    x = torch.randn(2, 257, device=CUDA).to(BF16).flatten()[:257].view(1, 257)[:, :256]
    assert x.is_contiguous() and x.stride(0) % 8
    assert relative_rms(packed(x, tile=tile), reference(x, packed)) < 4e-3


@needs_gluon()
def test_one_row_may_have_any_stride_in_w8a8(gpu):
    x, codes = (torch.randint(-128, 128, (n, 257), dtype=torch.int8, device=CUDA)[:, :256] for n in (1, 64))
    codes, scales = codes.contiguous(), torch.ones(64, device=CUDA)
    assert x.is_contiguous() and x.stride(0) % 16
    out = int8_matmul(x, torch.ones(1, device=CUDA), codes, scales, None, out_dtype=torch.float32, tile=HOPPER_TILES[0])
    assert torch.equal(out, (x.double() @ codes.double().t()).float())


# --- settings


def test_sums_of_dequantized_products_are_fp32_whatever_torch_is_set_to(monkeypatch):
    seen, multiply = [], torch.mm

    def mm(*args, **kwargs):
        seen.append(torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction)
        return multiply(*args, **kwargs)

    monkeypatch.setattr(torch, "mm", mm)
    assert torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction, "torch's default"
    with fake_gpu():
        packed = random_packed(64, 256, 4, 128, torch.float16, CUDA)
        x = torch.randn(40, 256, device=CUDA).half()
        assert relative_rms(packed(x, tile=Tile("dequant", 1, 16)), reference(x, packed)) < 1e-3
    assert seen and not any(seen)
    assert torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction
    with pytest.raises(ZeroDivisionError), prefill.fp32_sums():
        raise ZeroDivisionError
    assert torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction


def test_the_suite_of_gpu_check_has_shapes_of_real_layers():
    small, every = _shapes(True), _shapes(False)
    assert every[: len(small)] == small and len(every) > len(small)
    assert max(n for _, n, *_ in every) >= 4096 and max(k for _, _, k, *_ in every) >= 14336
