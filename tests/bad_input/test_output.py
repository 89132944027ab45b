"""An OUT that must not be written to."""

from __future__ import annotations

import pytest

from refusals import CALIBRATED, arguments


def test_an_output_that_exists_is_refused_without_overwrite(refused, model, tmp_path):
    (tmp_path / "out").mkdir()
    message = refused(["quantize", str(model), str(tmp_path / "out"), *CALIBRATED])
    assert message == f"the output folder {tmp_path / 'out'} exists; choose another name or add --overwrite"


def test_a_folder_that_is_no_model_is_not_overwritten(refused, model, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"\xff\xd8")
    message = refused(arguments(model, tmp_path / "photos", *CALIBRATED))
    assert "has no config.json, so it is not a model and is not replaced" in message


def test_an_output_that_is_a_file(refused, model, tmp_path):
    (tmp_path / "out").write_text("mine")
    assert "exists and is not a folder" in refused(arguments(model, tmp_path / "out", *CALIBRATED))


@pytest.mark.parametrize("place", ["model", "model/w4", "model/../model/a/b", "."])
def test_an_output_inside_or_around_the_model(refused, model, tmp_path, place):
    message = refused(["quantize", str(model), str(tmp_path / place), "--overwrite", *CALIBRATED])
    assert "must be outside the input folder" in message or "must be a folder with a name" in message
