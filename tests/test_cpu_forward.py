"""Sliced causal attention is causal attention, and everything that is something else is left alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lowbit import cpu_forward
from lowbit.cpu_forward import CpuForward


def _qkv(tokens, *, heads=6, kv_heads=2, keys=None, dtype=torch.float32):
    generator = torch.Generator().manual_seed(tokens)
    shapes = ((tokens, heads), (keys or tokens, kv_heads), (keys or tokens, kv_heads))
    # laid out as models have it: heads beside each other, then transposed
    return [torch.randn(2, t, h, 32, generator=generator).to(dtype).transpose(1, 2) for t, h in shapes]


def _exact(query, key, value, scale):
    query, key, value = (x.double() for x in (query, key, value))
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    scores = query @ key.transpose(-1, -2) * scale
    tokens = query.shape[-2]
    return scores.masked_fill(torch.ones(tokens, tokens).triu(1).bool(), -torch.inf).softmax(-1) @ value


@pytest.fixture
def sliced(monkeypatch):
    calls = []
    original = cpu_forward._sliced
    monkeypatch.setattr(cpu_forward, "_sliced", lambda *a, **k: calls.append(1) or original(*a, **k))
    return calls


@pytest.mark.parametrize("tokens", [256, 257, 300, 500, 511, 512])
@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("kv_heads", [2, 6])
def test_slices_equal_the_whole(sliced, tokens, scale, kv_heads):
    query, key, value = _qkv(tokens, kv_heads=kv_heads)
    options = {"scale": scale, "enable_gqa": kv_heads < 6, "is_causal": True}
    whole = F.scaled_dot_product_attention(query, key, value, **options)
    with CpuForward():
        result = F.scaled_dot_product_attention(query, key, value, **options)
    assert len(sliced) == 1
    assert result.shape == whole.shape
    assert result.transpose(1, 2).is_contiguous(), "as transformers asks for it next"
    exact = _exact(query, key, value, scale or 32**-0.5)
    # scores of 32 products, a sum over at most 512 weights: each a few roundings of float32
    torch.testing.assert_close(result.double(), exact, rtol=0, atol=64 * torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_16_bits_they_differ_from_the_exact_no_more_than_the_whole_does(sliced, dtype):
    query, key, value = _qkv(512, dtype=dtype)
    whole = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    with CpuForward():
        result = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    exact = _exact(query, key, value, 32**-0.5)
    error, allowed = ((x.double() - exact).square().mean().sqrt() for x in (result, whole))
    # torch 2.8 multiplies the whole in another way where there are fewer key heads
    more = 1.1 if torch.__version__ >= "2.9" else 1.5
    assert len(sliced) == 1 and result.dtype == dtype and error <= more * allowed


@pytest.mark.parametrize(
    ("tokens", "keys", "options"),
    [
        pytest.param(512, None, {}, id="not causal"),
        pytest.param(255, None, {"is_causal": True}, id="too short to gain"),
        pytest.param(513, None, {"is_causal": True}, id="so long that the kernel skips by itself"),
        pytest.param(256, 512, {"is_causal": True}, id="a cache"),
        pytest.param(512, None, {"attn_mask": torch.zeros(512, 512)}, id="a mask of the model's"),
        pytest.param(512, None, {"is_causal": True, "dropout_p": 0.5}, id="dropout"),
    ],
)
def test_what_is_left_alone(sliced, tokens, keys, options):
    query, key, value = _qkv(tokens, keys=keys, kv_heads=6)
    torch.manual_seed(0)
    whole = F.scaled_dot_product_attention(query, key, value, **options)
    torch.manual_seed(0)
    with CpuForward():
        result = F.scaled_dot_product_attention(query, key, value, **options)
    assert sliced == [] and torch.equal(result, whole)
