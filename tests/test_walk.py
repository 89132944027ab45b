"""The walk finds every block and linear by structure and replays exactly what the model does."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lowbit import walk
from lowbit.cpu_forward import CpuForward
from lowbit.walk import (
    HIDDEN,
    QUERY,
    Block,
    BlockInputs,
    BlockRun,
    capture_block_inputs,
    find_blocks,
    linear_groups,
    linears,
)
from tiny_models import ALL_LINEARS, FAMILIES, random_tokens, tiny_model

CPU = torch.device("cpu")
families = pytest.mark.parametrize("family", FAMILIES)


def _blocks_and_inputs(model, batch=2):
    blocks = find_blocks(model)
    with torch.no_grad():
        return blocks, capture_block_inputs(model, blocks, random_tokens().split(batch))


@families
def test_blocks_are_the_decoder_layers(family):
    model = tiny_model(family)
    blocks = find_blocks(model)
    assert len(blocks) == 2
    assert all(model.get_submodule(block.name) is block.module for block in blocks)
    assert all(len(linears(block.module)) == ALL_LINEARS[family] for block in blocks)


def test_a_model_without_blocks_is_refused_with_what_it_has():
    with pytest.raises(ValueError, match=r"Sequential: found no ModuleList .*0 \(Linear\)"):
        find_blocks(nn.Sequential(nn.Linear(4, 4)))


@families
@pytest.mark.parametrize("keep", [True, False])
def test_replay_gives_the_models_own_hidden_states(family, keep):
    """Sliding windows of 8 in 24 tokens make masks differ between blocks: guessed kwargs would show here."""
    model = tiny_model(family)
    blocks, inputs = _blocks_and_inputs(model)
    expected = []
    hooks = [
        b.module.register_forward_hook(lambda _m, _a, out: expected.append(out[0] if isinstance(out, tuple) else out))
        for b in blocks
    ]
    with torch.no_grad():
        model(random_tokens(), use_cache=False)
        for hook in hooks:
            hook.remove()
        for index, block in enumerate(blocks):
            groups = linear_groups(block, inputs, index, CPU)
            stops, unread = [group.names[0] for group in groups], [group.unread for group in groups]
            with BlockRun(block.module, inputs, index, stops, CPU, keep=keep, unread=unread) as run:
                for stage in range(len(stops)):  # one batch halts everywhere, the others run through
                    run.inputs(stage, 0)
                run.finish()
            assert torch.equal(torch.cat(inputs.hidden), expected[index])


@families
def test_capture_leaves_the_model_as_it_was(family):
    model = tiny_model(family)
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    _blocks_and_inputs(model)
    for name, module in model.named_modules():
        assert vars(module).keys() == before[name].keys(), name


def test_equal_arguments_of_batches_are_kept_once():
    _, inputs = _blocks_and_inputs(tiny_model("llama"))
    assert len(inputs.arguments[0]) == 3
    assert all(rest is inputs.arguments[0][0] for rest in inputs.arguments[0])


LLAMA = [
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
]
GROUPS = {
    "llama": LLAMA,
    "qwen3": LLAMA,
    "mistral": LLAMA,
    "gemma3": LLAMA,
    "phi3": [("self_attn.qkv_proj",), ("self_attn.o_proj",), ("mlp.gate_up_proj",), ("mlp.down_proj",)],
    "gpt_neox": [("attention.query_key_value",), ("attention.dense",), ("mlp.dense_h_to_4h",), ("mlp.dense_4h_to_h",)],
    "opt": [("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("self_attn.out_proj",), ("fc1",), ("fc2",)],
}


@families
def test_linears_that_read_one_tensor_form_one_group_in_execution_order(family):
    blocks, inputs = _blocks_and_inputs(tiny_model(family))
    found = linear_groups(blocks[0], inputs, 0, CPU)
    assert [tuple(sorted(g.names)) for g in found] == [tuple(sorted(names)) for names in GROUPS[family]]


def _given_back(tensor):
    """Whether only the shape is left; what is read by mistake is NaN."""
    return (
        tensor.untyped_storage().nbytes() == tensor.element_size() and tensor.ndim == 3 and bool(tensor.isnan().all())
    )


def test_the_memory_of_what_is_read_no_more_is_given_back(monkeypatch):
    """A halted block's frames still refer to it, and some ask it for its shape."""
    blocks, inputs = _blocks_and_inputs(tiny_model("llama"))
    groups = linear_groups(blocks[0], inputs, 0, CPU)
    assert [group.unread for group in groups] == [
        set(),
        {QUERY, *LLAMA[0]},
        {QUERY, HIDDEN, *LLAMA[0], *LLAMA[1]},
        {QUERY, HIDDEN, *LLAMA[0], *LLAMA[1], *LLAMA[2]},
    ]
    queries = []
    monkeypatch.setattr(walk, "CpuForward", lambda see: CpuForward(lambda q: (queries.append(q), see(q))))
    stops = [group.names[0] for group in groups]
    caught = []
    hook = linears(blocks[0].module)[stops[0]].register_forward_pre_hook(lambda _, args: caught.append(args[0]))
    unread = [group.unread for group in groups]
    with torch.no_grad(), BlockRun(blocks[0].module, inputs, 0, stops, CPU, keep=True, unread=unread) as run:
        run.inputs(0, 0)
        assert not _given_back(caught[0])
        shape = caught[0].shape
        run.inputs(1, 0)
        assert _given_back(caught[0]) and caught[0].shape == shape
        assert [q.untyped_storage().nbytes() for q in queries] == [4]
        assert not _given_back(inputs.hidden[0])
        run.inputs(2, 0)
        assert _given_back(inputs.hidden[0])
    hook.remove()


class _Remembering(nn.Module):
    """Blocks that are handed the embeddings as well, the very tensor or a view of it."""

    def __init__(self, view: bool) -> None:
        super().__init__()
        self.view, self.embed = view, nn.Embedding(8, 4)
        self.layers = nn.ModuleList(_RememberingBlock() for _ in range(2))

    def forward(self, ids, use_cache=False):
        embedded = self.embed(ids)
        x = embedded.view(-1, 4).view_as(embedded) if self.view else embedded
        for layer in self.layers:
            x = layer(x, embedded)
        return x


class _RememberingBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x, embedded):
        return x + self.last(self.first(x).relu()) + embedded


@pytest.mark.parametrize("view", [True, False])
@pytest.mark.parametrize("keep", [True, False])
def test_arguments_outlive_the_hidden_states_they_share_memory_with(view, keep):
    model, ids = _Remembering(view), torch.arange(6).view(2, 3)
    blocks = find_blocks(model)
    with torch.no_grad():
        expected = model(ids)
        inputs = capture_block_inputs(model, blocks, [ids])
        for index, block in enumerate(blocks):
            groups = linear_groups(block, inputs, index, CPU)
            stops, unread = [group.names[0] for group in groups], [group.unread for group in groups]
            with BlockRun(block.module, inputs, index, stops, CPU, keep=keep, unread=unread) as run:
                for stage in range(len(stops)):
                    run.inputs(stage, 0)
                run.finish()
    assert torch.equal(inputs.hidden[0], expected)


class _LearnedQueries(nn.Module):
    """Asks its parameter, or what it reads again at its end."""

    def __init__(self, again: bool) -> None:
        super().__init__()
        self.again, self.query = again, nn.Parameter(torch.randn(1, 1, 3, 8))
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        y = self.first(x).unsqueeze(1)
        query = y + 1 if self.again else self.query
        y = nn.functional.scaled_dot_product_attention(query, y, y).squeeze(1)
        return self.last(y) + (query.squeeze(1) if self.again else 0)


@pytest.mark.parametrize("again", [True, False])
def test_queries_that_are_read_again_or_are_parameters_keep_their_memory(again):
    block = Block("block", _LearnedQueries(again))
    inputs = BlockInputs([torch.randn(1, 3, 8)], [[((), {})]])
    groups = linear_groups(block, inputs, 0, CPU)
    assert [QUERY in group.unread for group in groups] == [False, False]


def test_the_head_runs_for_the_first_batch_only():
    model = tiny_model("llama")
    calls = []
    model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    _, inputs = _blocks_and_inputs(model)
    assert len(inputs.hidden) == 3
    assert len(calls) == 1


@pytest.mark.parametrize("keep", [True, False])
def test_a_later_stage_sees_what_was_done_to_an_earlier_one(keep):
    """True-sequential: zeroing v after stage 0 makes o's inputs zero."""
    model = tiny_model("llama")
    blocks, inputs = _blocks_and_inputs(model)
    names = ["self_attn.q_proj", "self_attn.o_proj"]
    with torch.no_grad(), BlockRun(blocks[0].module, inputs, 0, names, CPU, keep=keep) as run:
        first = [run.inputs(0, batch) for batch in run.batches]
        linears(blocks[0].module)["self_attn.v_proj"].weight.zero_()
        second = [run.inputs(1, batch) for batch in run.batches]
    assert all(x.shape == (2 * 24, 64) for x in first + second)
    assert all(bool(x.any()) for x in first)
    assert not any(bool(x.any()) for x in second)


def test_a_run_left_half_way_removes_its_hooks():
    model = tiny_model("llama")
    blocks, inputs = _blocks_and_inputs(model)
    with (
        pytest.raises(KeyboardInterrupt),
        BlockRun(blocks[0].module, inputs, 0, ["self_attn.o_proj"], CPU, keep=True) as run,
    ):
        run.inputs(0, 0)
        raise KeyboardInterrupt
    assert not any(linear._forward_pre_hooks for linear in linears(blocks[0].module).values())


def test_a_linear_that_runs_twice_is_refused_by_name():
    model = tiny_model("llama")
    block = model.model.layers[0]
    original = copy.copy(block.mlp.forward)
    block.mlp.forward = lambda x: original(original(x))
    blocks, inputs = _blocks_and_inputs(model)
    with pytest.raises(ValueError, match=r"model.layers.0.mlp.gate_proj runs more than once"):
        linear_groups(blocks[0], inputs, 0, CPU)


def test_a_linear_that_runs_twice_may_be_left_out():
    model = tiny_model("llama")
    block = model.model.layers[0]
    original = copy.copy(block.mlp.forward)
    block.mlp.forward = lambda x: original(original(x))
    blocks, inputs = _blocks_and_inputs(model)
    assert [group.names for group in linear_groups(blocks[0], inputs, 0, CPU, LLAMA[0])] == [LLAMA[0]]


class _Wrong(nn.Module):
    """A model that calls its blocks in an order the walk cannot replay."""

    def __init__(self, calls):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.calls = calls

    def forward(self, tokens, use_cache):
        x = tokens.float()
        for call in self.calls:
            x = self.layers[call](x)
        return x


@pytest.mark.parametrize("calls", [(0, 0, 1), (1, 0), (0,), (0, 1, 1)])
def test_blocks_that_do_not_run_once_each_in_order_are_refused(calls):
    model = _Wrong(calls)
    with pytest.raises(ValueError, match=r"run once each|was called"):
        capture_block_inputs(model, find_blocks(model), [torch.ones(2, 4, dtype=torch.int64)])
    assert all("forward" not in vars(block) for block in model.layers)
