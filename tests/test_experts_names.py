"""Experts that the architecture's own files hold merged, under names and in orders of their own."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from lowbit import convert, load, quantize
from lowbit.doctor import diagnose, knowledge
from lowbit.expand import DenseLayout, MergedExperts, check_experts
from lowbit.hf.experts import CONVERTS_FIRST
from lowbit.limits import engine_limits
from tiny_models import BOOKS_4M

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own, about configurations this small

VOCAB = 4096
_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
_FOUR: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
_SECTIONS = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
_VISION: dict[str, Any] = {"depth": 1, "hidden_size": 64, "num_heads": 2, "intermediate_size": 64}


def _qwen3_vl_moe() -> Any:
    return transformers.Qwen3VLMoeConfig(
        vision_config={**_VISION, "out_hidden_size": 64, "deepstack_visual_indexes": [0]},
        text_config={**_COMMON, **_FOUR, "head_dim": 16, "rope_parameters": _SECTIONS},
        image_token_id=VOCAB - 1,
        video_token_id=VOCAB - 2,
    )


def _ernie_vl() -> Any:
    experts = {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": [64, 32], "moe_num_shared_experts": 1}
    return transformers.Ernie4_5_VLMoeConfig(
        vision_config=_VISION,
        text_config={**_COMMON, **experts, "rope_parameters": _SECTIONS},
        image_token_id=VOCAB - 1,
    )


def _inkling() -> Any:
    if not hasattr(transformers, "Inkling2TextConfig"):
        pytest.skip("this transformers has no Inkling 2")
    return transformers.Inkling2TextConfig(**_COMMON, **_FOUR, head_dim=16, n_routed_experts=4)


CONFIGS: dict[str, Callable[[], Any]] = {
    # other names than the module's parameters have
    "granitemoe": lambda: transformers.GraniteMoeConfig(**_COMMON, num_local_experts=4, num_experts_per_tok=2),
    "granitemoeshared": lambda: transformers.GraniteMoeSharedConfig(
        **_COMMON, num_local_experts=4, num_experts_per_tok=2, shared_intermediate_size=64
    ),
    "aria_text": lambda: transformers.AriaTextConfig(
        **_COMMON, moe_num_experts=4, moe_topk=2, moe_num_shared_experts=1
    ),
    "qwen3_vl_moe": _qwen3_vl_moe,  # a converter, but none that takes experts apart
    "inkling2_text": _inkling,  # rows of gate and up in turn, which the module has one after the other
    "gpt_oss": lambda: transformers.GptOssConfig(
        **_COMMON, head_dim=16, num_local_experts=4, num_experts_per_tok=2, layer_types=["full_attention"] * 2
    ),
    "mixtral": lambda: transformers.MixtralConfig(**_COMMON, num_local_experts=4, num_experts_per_tok=2),
    "ernie4_5_vl_moe": _ernie_vl,
}
MERGED = ("granitemoe", "granitemoeshared", "aria_text", "qwen3_vl_moe", "inkling2_text")


def auto(name: str) -> Any:
    return transformers.AutoModelForImageTextToText if "_vl_" in name else transformers.AutoModelForCausalLM


def packed_folder(name: str, folder: Path, ignore: Sequence[str] = ()) -> Path:
    """``folder/packed``, quantized from ``folder/original``."""
    config = CONFIGS[name]()
    torch.manual_seed(0)
    model = auto(name).from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, 0.1)
    model.save_pretrained(folder / "original")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(BOOKS_4M / file, folder / "original" / file)
    quantize(
        folder / "original", folder / "packed", 4, group_size=32, method="rtn", ignore=ignore, allow_partial=True,
        verbose=False,
    )  # fmt: skip
    return folder / "packed"


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(torch.arange(3, 27)[None]).logits
    return found


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_opens_as(name: str, dense: Path, packed: Path) -> None:
    """Plain transformers finds every weight of the dense folder, and computes what the packed one does."""
    model, info = auto(name).from_pretrained(dense, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    expected = logits(load(packed, device="cpu")[0])
    assert (logits(model) - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("name", MERGED)
def test_the_dense_folder_is_as_the_architectures_own(name: str, tmp_path: Path) -> None:
    packed = packed_folder(name, tmp_path)
    convert(packed, tmp_path / "dense", "dense", verbose=False)
    shapes = [{key: t.shape for key, t in tensors(tmp_path / kind).items()} for kind in ("original", "dense")]
    assert shapes[0] == shapes[1]
    assert_opens_as(name, tmp_path / "dense", packed)


@pytest.mark.parametrize("left", [r"layers\.1\..*experts", r"layers\.1\..*experts\.2\."])
@pytest.mark.parametrize("name", ["granitemoe", "qwen3_vl_moe"])
def test_experts_left_dense_stay_beside_packed_ones(name: str, left: str, tmp_path: Path) -> None:
    packed = packed_folder(name, tmp_path, [left])
    load(packed, device="cpu")[0].save_pretrained(tmp_path / "again")
    first, again = tensors(packed), tensors(tmp_path / "again")
    assert first.keys() == again.keys() and all(torch.equal(first[key], again[key]) for key in first)
    convert(packed, tmp_path / "dense", "dense", verbose=False)
    assert_opens_as(name, tmp_path / "dense", packed)


# --- what cannot be merged


@pytest.mark.skipif(not CONVERTS_FIRST, reason="transformers before 5.21 finds no names for the model's routers")
def test_experts_that_files_hold_with_another_modules_are_refused_before_writing(tmp_path: Path) -> None:
    """Ernie 4.5 VL numbers the experts for text and those for images through, of different widths."""
    packed = packed_folder("ernie4_5_vl_moe", tmp_path)
    with pytest.raises(
        ValueError, match=r"layers\.\d\.mlp\.\w+_moe\.experts\.0\.\w+: .* together with those of another"
    ):
        convert(packed, tmp_path / "dense", "dense", verbose=False)
    assert not (tmp_path / "dense").exists()


@pytest.mark.skipif(CONVERTS_FIRST, reason="transformers from 5.21 on finds those names")
def test_a_model_whose_names_transformers_cannot_tell_is_refused_before_the_work(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"transformers 5\.\d+\.\d+ cannot say how files of Ernie4_5_VLMoe"):
        packed_folder("ernie4_5_vl_moe", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["original"]


def test_names_are_asked_for_before_the_work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def missing(model: Any, state: Any) -> Any:
        raise KeyError("router")

    monkeypatch.setattr("lowbit.hf.export.checkpoint_names", missing)
    with pytest.raises(ValueError, match=r"cannot say how files of GraniteMoeForCausalLM name .*KeyError: 'router'"):
        packed_folder("granitemoe", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["original"]


@pytest.mark.parametrize("layer", ["model.layers.0.mlp.experts.0.linear_gate", "layers.0.mlp.experts.0.up_proj"])
def test_an_expert_that_belongs_to_none_of_the_merged_is_named(layer: str) -> None:
    how = MergedExperts("model.layers.0.mlp.experts", 4, True, False, False, True)
    layout = DenseLayout(merged={how.module: how})
    check_experts(layout, [f"{how.module}.3.up_proj", "model.layers.0.mlp.shared_experts.up_proj"])
    with pytest.raises(ValueError, match=rf"^{layer}: .* as in model\.layers\.0\.mlp\.experts\.0\.down_proj"):
        check_experts(layout, [layer])
    check_experts(DenseLayout(), [layer])  # an architecture whose files hold single experts


# --- what plain transformers makes of the packed folder

ROW = next(row for row in knowledge()["rows"] if row["id"] == "transformers-merged-experts")


@pytest.mark.parametrize("name", ["granitemoe", "qwen3_vl_moe", "gpt_oss", "mixtral"])
def test_the_doctor_knows_which_packed_folders_plain_transformers_cannot_read(name: str, tmp_path: Path) -> None:
    packed = packed_folder(name, tmp_path)
    answers = [answer for answer in diagnose(packed).answers if answer.engine == "transformers"]
    reads = name == "mixtral"
    assert {answer.verdict for answer in answers} == {"expanded" if reads else "wrong"}
    if not reads:
        assert all(any("--to dense" in fix for fix in answer.fixes) for answer in answers), "which it does read"
    assert reads == (not [note for note in engine_limits(name, True) if "plain transformers" in note])
    pytest.importorskip("compressed_tensors")
    if transformers.__version__ in ROW["versions"]:
        _, info = auto(name).from_pretrained(packed, output_loading_info=True)
        assert reads == (not any("experts" in key for key in info["missing_keys"]))


@pytest.mark.skipif(transformers.__version__ not in ROW["versions"], reason="the row speaks of another transformers")
def test_transformers_takes_no_experts_apart_that_the_row_names() -> None:
    for model_type in ROW["when"]["model_type"]:
        for entry in get_checkpoint_conversion_mapping(model_type) or ():
            if any("experts." in target for target in entry._original_target_patterns):
                assert not any(".*." in source for source in entry._original_source_patterns), model_type
