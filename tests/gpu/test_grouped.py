"""Packed experts on a real GPU: common calls against one by one, graphs, and no wait for the device."""

import copy

import pytest
import torch

from helpers import assert_close, tolerance
from lowbit.experts import Experts
from lowbit.ops import CUDA_TILES
from lowbit.spec import ActivationSpec, QuantSpec
from merged_experts import packed_experts, routing

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no CUDA GPU here (torch.cuda.is_available() is False)"
)


W4 = QuantSpec(4, -1, False)
W8A8 = [QuantSpec(8, -1, symmetric, ActivationSpec(dynamic=symmetric)) for symmetric in (True, False)]


def on_gpu(dtype, spec=W4, **choices) -> Experts:
    experts = packed_experts(spec, dtype, inner=64, **choices).cuda().repack()
    assert experts.stacked
    assert spec != W4 or experts.get_submodule("down").layout == CUDA_TILES
    return experts


def routed(count, dtype):
    x, chosen, weights = routing(count)
    return x.to("cuda", dtype), chosen.cuda(), weights.to("cuda", dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("choices", [{}, {"bias": True, "concatenated": False}, {"gate": False}], ids=str)
@pytest.mark.parametrize("spec", [W4, *W8A8, [W4, QuantSpec(8, -1), W8A8[0]]], ids=["w4", "w8a8", "static", "kinds"])
def test_common_calls_give_what_one_by_one_gives(dtype, choices, spec):
    experts = on_gpu(dtype, spec, **choices)
    apart = copy.deepcopy(experts)
    apart.take_apart()
    for count in (0, 1, 9, 300):
        arguments = routed(count, dtype)
        assert_close(experts(*arguments), apart(*arguments), **tolerance(dtype, 8, 64))


@pytest.mark.parametrize("spec", [W4, *W8A8, [W4, W8A8[1]]], ids=["w4", "w8a8", "static", "kinds"])
def test_nothing_waits_for_the_device(spec):
    """torch raises at the first wait; one by one there is one, which shows that it would."""
    experts, arguments = on_gpu(torch.bfloat16, spec, bias=True), routed(9, torch.bfloat16)
    expected = experts(*arguments)
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = experts(*arguments)
        experts.take_apart()
        with pytest.raises(RuntimeError, match="synchronizing"):
            experts(*arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(out, expected)


@pytest.mark.parametrize("spec", [W4, *W8A8, [W4, W8A8[1]]], ids=["w4", "w8a8", "static", "kinds"])
def test_a_graph_replays_with_another_routing(spec):
    experts = on_gpu(torch.bfloat16, spec)
    x, chosen, weights = routed(9, torch.bfloat16)
    experts(x, chosen, weights)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = experts(x, chosen, weights)
    for other in (chosen.clone(), (chosen + 2) % 5, torch.zeros_like(chosen)):
        chosen.copy_(other)
        graph.replay()
        assert torch.equal(out, experts(x, chosen, weights))


def test_what_is_saved_is_what_was_loaded():
    experts = packed_experts(QuantSpec(4, -1, False), torch.bfloat16, bias=True, inner=64)
    state = {name: tensor.clone() for name, tensor in experts.state_dict().items()}
    for name, tensor in experts.cuda().repack().state_dict().items():
        assert tensor.is_cuda and torch.equal(tensor.cpu(), state[name])
