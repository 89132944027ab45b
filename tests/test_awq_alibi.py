"""AWQ on blocks whose arguments cannot be cut to one sequence."""

from __future__ import annotations

import pytest

from architectures import logits, tiny, tokens
from lowbit import QuantSpec, quantize_


@pytest.mark.parametrize("method", ["awq", "awq+gptq"])
def test_blooms_alibi_has_a_row_for_each_head_of_each_sequence(method: str) -> None:
    model, ids = tiny("bloom"), tokens(6)
    before = logits(model, ids)
    report = quantize_(model, QuantSpec(4, 32), method, calibration=ids)
    assert len(report.layers) == 8
    assert (logits(model, ids) - before).norm() < 0.3 * before.norm()
