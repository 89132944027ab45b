"""Which scales can be moved where inside a decoder block: architecture knowledge as tables.

AWQ multiplies the input columns of some linears by a scale and divides it out of whatever produces their input: a
norm's weight, or the output rows of a linear. That changes nothing only where no other reader of the producer exists
and nothing between the two mixes channels. The tables below say where that holds, and mixture.py says it of experts.
They are keyed by structure (the norms a block has, the names of its projections), not by class name, so that the many
families that share Llama's wiring need no entry of their own; a block that has anything the tables do not know gets no
fold there, and :func:`reasons_without_fold` says why. Names are relative to one decoder block.

Structure is strong evidence, not proof: :func:`lowbit.fold.exact_folds` tests every fold on real inputs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .mixture import Mixture, find_mixture

__all__ = ["NOT_QUANTIZED", "Fold", "norm_offset", "reasons_without_fold", "resolve"]


@dataclass(frozen=True)
class Fold:
    """One scale ``(K,)`` that leaves ``smooth`` and enters ``balance``. See :func:`lowbit.fold.apply_fold`.

    Attributes:
        smooth: norm or linear whose output is divided by the scale.
        balance: linears that read it; their K input columns are multiplied by the scale.
        others: modules with a 2-D ``weight`` that read it too and stay dense (routers); their columns are as well.
        norm_offset: 1 for a norm that multiplies by ``1 + weight`` (Gemma), else 0.
        rows: output row of the linear ``smooth`` that produces channel c; None when ``smooth`` is a norm.
        channels: for each of the K columns the channel it reads, where several columns read one (grouped-query
            attention); None when column k reads channel k.
    """

    smooth: str
    balance: tuple[str, ...]
    norm_offset: int = 0
    rows: tuple[int, ...] | None = None
    channels: tuple[int, ...] | None = None
    others: tuple[str, ...] = ()

    def channel_ids(self) -> Tensor | None:
        """``channels`` as an int64 tensor ``(K,)``, as :func:`lowbit.calib.awq.search_scales` takes it."""
        return None if self.channels is None else torch.tensor(self.channels)


@dataclass(frozen=True)
class _Norms:
    """The norms that are direct children of a block, all of them, and what each of the two branches reads."""

    names: frozenset[str]
    attention: str | None
    mlp: str | None


@dataclass(frozen=True)
class _Branch:
    """The linears of one branch, all of them.

    ``rows`` is where the rows that ``output`` reads lie in the last of ``inputs``: "all" of them, the "last" block
    after the others (Phi-3's ``qkv_proj`` and ``gate_up_proj``), or the last "third" of every head (GPT-NeoX).
    ``gated``: the product of an activation and a linear output, which lets a scale through whatever the activation.
    """

    inputs: tuple[str, ...]
    output: str
    rows: str = "all"
    gated: bool = False


@dataclass(frozen=True)
class _Reader:
    """Who reads the input of a branch, and the norms inside the branch that a scale would have to pass."""

    inputs: tuple[str, ...]
    others: tuple[str, ...] = ()
    norms: tuple[str, ...] = ()


def _norms(attention: str | None, mlp: str | None, *after: str) -> _Norms:
    return _Norms(frozenset({name for name in (attention, mlp) if name} | set(after)), attention, mlp)


_NORMS = (
    # Llama, Qwen2/3, Mistral, Gemma 1, Phi-3, Granite, SmolLM3, StableLM, StarCoder2, Nemotron, GLM, GPT-NeoX
    _norms("input_layernorm", "post_attention_layernorm"),
    # Cohere, Phi (1 to 2), StableLM with parallel residual: one norm feeds both branches
    _norms("input_layernorm", "input_layernorm"),
    # Gemma 2 and 3: each branch between two norms
    _norms("input_layernorm", "pre_feedforward_layernorm", "post_attention_layernorm", "post_feedforward_layernorm"),
    # GLM-4
    _norms("input_layernorm", "post_attention_layernorm", "post_self_attn_layernorm", "post_mlp_layernorm"),
    # OLMo 2 and 3, EXAONE 4: norms only after the branches, nothing to fold into before them
    _norms(None, None, "post_attention_layernorm", "post_feedforward_layernorm"),
    # OPT, BioGPT
    _norms("self_attn_layer_norm", "final_layer_norm"),
    # Apertus
    _norms("attention_layernorm", "feedforward_layernorm"),
)

_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_ATTENTION = (
    _Branch(_QKV, "self_attn.o_proj"),
    _Branch(_QKV, "self_attn.dense"),  # Phi
    _Branch(_QKV, "self_attn.out_proj"),  # OPT
    _Branch(("self_attn.qkv_proj",), "self_attn.o_proj", rows="last"),  # Phi-3
    _Branch(("attention.query_key_value",), "attention.dense", rows="third"),  # GPT-NeoX
)
_MLP = (
    _Branch(("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj", gated=True),
    _Branch(("mlp.gate_up_proj",), "mlp.down_proj", rows="last", gated=True),  # Phi-3, GLM
    _Branch(("mlp.up_proj",), "mlp.down_proj"),  # Nemotron, Apertus, Arcee
    _Branch(("mlp.fc1",), "mlp.fc2"),  # Phi
    _Branch(("mlp.dense_h_to_4h",), "mlp.dense_4h_to_h"),  # GPT-NeoX
    _Branch(("mlp.c_fc",), "mlp.c_proj"),  # StarCoder2
    _Branch(("fc1",), "fc2"),  # OPT
)

# Norms on queries and keys come after their projections and before the scores: no fold passes through them.
_QUERY_KEY_NORMS = frozenset({"q_norm", "k_norm", "q_layernorm", "k_layernorm", "query_layernorm", "key_layernorm"})

# Wiring that the modules of a block do not show.
_NO_FOLDS = {
    "minimax": "the residual stream continues from the norms' outputs",
    "bloom": "the residual stream may continue from the norms' outputs",
}

NOT_QUANTIZED = "a linear that reads the same is not quantized"
_NO_TABLE = "no folding table fits this block"


def resolve(block: nn.Module, model_type: str = "") -> list[Fold]:
    """Folds of one decoder block, in the order attention input, attention output, MLP input, MLP output.

    Args:
        block: a decoder block with real (not meta) weights.
        model_type: ``config.model_type``; only needed for the few families whose modules do not show their wiring.

    Raises:
        ValueError: the block's weights are on the meta device.
    """
    return _resolve(block, model_type)[0]


def reasons_without_fold(block: nn.Module, model_type: str = "") -> dict[str, str]:
    """``{linear: reason}`` for every ``nn.Linear`` of the block whose input no fold of :func:`resolve` scales."""
    return _resolve(block, model_type)[1]


def norm_offset(norm: nn.Module) -> int | None:
    """0 if the norm multiplies by its weight, 1 if by ``1 + weight``, None if it does neither (or has no weight).

    Found by running it with weights 0 and 1, so that no list of class names decides how a weight is scaled.

    Raises:
        ValueError: the weight is on the meta device, where nothing can be run.
    """
    weight = getattr(norm, "weight", None)
    if not isinstance(weight, nn.Parameter) or weight.ndim != 1:
        return None
    if weight.is_meta:
        raise ValueError("cannot resolve folds of a block on the meta device: its norms have to be run")
    others = {name: torch.zeros_like(p) for name, p in norm.named_parameters() if name != "weight"}
    if not set(others) <= {"bias"}:
        return None
    probe = torch.linspace(-1, 2, weight.numel(), dtype=weight.dtype, device=weight.device).unsqueeze(0)
    with torch.no_grad():
        zero = functional_call(norm, {"weight": torch.zeros_like(weight), **others}, (probe,)).double()
        one = functional_call(norm, {"weight": torch.ones_like(weight), **others}, (probe,)).double()
    if not bool(one.any()):
        return None
    tolerance = 4 * torch.finfo(weight.dtype).eps * float(one.abs().max())
    if not bool(zero.any()):
        return 0
    return 1 if bool(((one - 2 * zero).abs() <= tolerance).all()) else None


def _resolve(block: nn.Module, model_type: str) -> tuple[list[Fold], dict[str, str]]:
    linears = {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}
    reasons = dict.fromkeys(linears, _NO_TABLE)
    if model_type in _NO_FOLDS:
        return [], dict.fromkeys(linears, _NO_FOLDS[model_type])
    if getattr(block, "do_layer_norm_before", True) is False:
        return [], dict.fromkeys(linears, "the norms come after the branches (do_layer_norm_before is False)")
    attention, mlp = _match(_ATTENTION, linears), _match(_MLP, linears)
    mixture = find_mixture(block)
    folds = _norm_folds(block, linears, _reader(block, attention), _reader(block, mlp, mixture), mixture, reasons)
    if attention is not None:
        folds.append(_value_fold(block, linears, attention, reasons))
    if mlp is not None:
        folds.append(_mlp_fold(block, linears, mlp, reasons))
    if mixture is not None:
        reasons.update(mixture.reasons)
        folds += [_row_fold(linears, up, down) for up, down in mixture.pairs]
    found = [fold for fold in folds if fold is not None]
    attention_names = (*attention.inputs, attention.output) if attention else ()
    found.sort(key=lambda fold: (fold.balance[0] not in attention_names, fold.rows is not None))
    covered = {name for fold in found for name in fold.balance}
    return found, {name: reason for name, reason in reasons.items() if name not in covered}


def _match(branches: Iterable[_Branch], linears: Mapping[str, nn.Linear]) -> _Branch | None:
    """The branch all of whose linears exist and that knows every linear under the same parent module."""
    for branch in branches:
        names = {*branch.inputs, branch.output}
        parent = branch.output.rpartition(".")[0]
        family = {name for name in linears if name.startswith(f"{parent}.")} if parent else names & set(linears)
        if names <= set(linears) and family == names:
            return branch
    return None


def _reader(block: nn.Module, branch: _Branch | None, mixture: Mixture | None = None) -> _Reader | None:
    if branch is not None:
        norms = _inner_norms(_parent(block, branch)) if "." in branch.output else []
        return _Reader(branch.inputs, norms=tuple(norms))
    return _Reader(mixture.inputs, mixture.others) if mixture is not None and mixture.inputs else None


def _parent(block: nn.Module, branch: _Branch) -> nn.Module:
    return block.get_submodule(branch.output.rpartition(".")[0])


def _inner_norms(parent: nn.Module) -> list[str]:
    """Norms inside a branch that a scale would have to pass; those on queries and keys it need not."""
    names = (name for name, _ in parent.named_children() if "norm" in name or "_ln" in name)
    return [name for name in names if name not in _QUERY_KEY_NORMS]


def _norm_folds(
    block: nn.Module,
    linears: Mapping[str, nn.Linear],
    attention: _Reader | None,
    mlp: _Reader | None,
    mixture: Mixture | None,
    reasons: dict[str, str],
) -> list[Fold | None]:
    """norm -> the linears that read it, for a block whose norms and parts are all known."""
    norms = {name for name, _ in block.named_children() if "norm" in name}
    table = next((t for t in _NORMS if t.names == norms), None)
    known = {"self_attn", "attention", "mlp", "fc1", "fc2", *norms, *([mixture.name] if mixture else [])}
    strangers = [n for n, child in block.named_children() if n not in known and any(True for _ in child.parameters())]
    if table is None or strangers:
        why = f"unknown parts {strangers}" if strangers else f"unknown arrangement of norms {sorted(norms)}"
        reasons.update({name: f"{_NO_TABLE}: {why}" for part in (attention, mlp) if part for name in part.inputs})
        return []
    groups: dict[str, list[_Reader | None]] = {}
    for norm, part in ((table.attention, attention), (table.mlp, mlp)):
        if norm is not None:
            groups.setdefault(norm, []).append(part)
        elif part is not None:
            reasons.update(dict.fromkeys(part.inputs, "no norm before it"))
    return [_norm_fold(block, linears, norm, parts, reasons) for norm, parts in groups.items()]


def _norm_fold(
    block: nn.Module,
    linears: Mapping[str, nn.Linear],
    norm: str,
    parts: list[_Reader | None],
    reasons: dict[str, str],
) -> Fold | None:
    known = [part for part in parts if part is not None]
    balance = tuple(name for part in known for name in part.inputs)
    if not known or len(known) < len(parts):
        reasons.update(dict.fromkeys(balance, f"{norm} is also read by a branch that no table knows"))
        return None
    inner = [name for part in known for name in part.norms]
    offset = norm_offset(block.get_submodule(norm))
    weight = getattr(block.get_submodule(norm), "weight", None)
    if inner or offset is None or weight is None:
        why = f"unknown norms {inner} inside the branch" if inner else f"{norm} has no weight to take a scale"
        reasons.update(dict.fromkeys(balance, why))
        return None
    if any(linears[name].in_features != weight.numel() for name in balance):
        reasons.update(dict.fromkeys(balance, f"{norm} is not as wide as what reads it"))
        return None
    return Fold(norm, balance, norm_offset=offset, others=tuple(name for part in known for name in part.others))


def _value_fold(
    block: nn.Module, linears: Mapping[str, nn.Linear], branch: _Branch, reasons: dict[str, str]
) -> Fold | None:
    """value rows -> output projection: attention mixes tokens, not channels. Shared heads share their scale."""
    parent = _parent(block, branch)
    source, width = linears[branch.inputs[-1]], linears[branch.output].in_features
    head_dim = getattr(parent, "head_dim", None) or getattr(parent, "head_size", None)
    inner = _inner_norms(parent)
    clip = getattr(getattr(parent, "config", None), "clip_qkv", None)
    if inner or clip is not None:
        reasons[branch.output] = f"norms {inner} after the values" if inner else "the values are clamped (clip_qkv)"
        return None
    first, rows = 0, source.out_features
    if branch.rows == "last":
        rows = (source.out_features - width) // 2
        first = source.out_features - rows
    if branch.rows == "third":
        if not isinstance(head_dim, int) or source.out_features != 3 * width or width % head_dim:
            reasons[branch.output] = "heads of the fused projection are not known"
            return None
        lines = tuple(3 * (i // head_dim) * head_dim + 2 * head_dim + i % head_dim for i in range(width))
        return Fold(branch.inputs[-1], (branch.output,), rows=lines)
    lines = tuple(range(first, first + rows))
    if rows == width:
        return Fold(branch.inputs[-1], (branch.output,), rows=lines)
    if not isinstance(head_dim, int) or rows < 1 or rows % head_dim or width % rows:
        reasons[branch.output] = f"{width} inputs do not follow from {rows} value rows"
        return None
    repeat = width // rows
    channels = tuple((i // head_dim // repeat) * head_dim + i % head_dim for i in range(width))
    return Fold(branch.inputs[-1], (branch.output,), rows=lines, channels=channels)


def _mlp_fold(
    block: nn.Module, linears: Mapping[str, nn.Linear], branch: _Branch, reasons: dict[str, str]
) -> Fold | None:
    """up rows -> down: exact through a product, and through ReLU because ``relu(x / s) = relu(x) / s`` for s > 0."""
    parent = _parent(block, branch)
    source, width = linears[branch.inputs[-1]], linears[branch.output].in_features
    if "." in branch.output and (inner := _inner_norms(parent)):
        reasons[branch.output] = f"norms {inner} between the two linears"
        return None
    if not branch.gated:
        names = ("activation_fn", "act_fn", "act", "activation")
        act = next((a for a in (getattr(parent, name, None) for name in names) if a is not None), None)
        if not isinstance(act, nn.ReLU):
            reasons[branch.output] = f"no scale passes its activation ({type(act).__name__})"
            return None
    first = source.out_features - width
    if first != (width if branch.rows == "last" else 0):
        reasons[branch.output] = f"{width} inputs do not follow from {source.out_features} rows"
        return None
    return Fold(branch.inputs[-1], (branch.output,), rows=tuple(range(first, first + width)))


def _row_fold(linears: Mapping[str, nn.Linear], up: str, down: str) -> Fold:
    """up rows -> down of one expert, which :func:`~lowbit.mixture.find_mixture` found to be proportional."""
    return Fold(up, (down,), rows=tuple(range(linears[down].in_features)))
