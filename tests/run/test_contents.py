"""What the identity of a run says of its contents."""

from __future__ import annotations

from pathlib import Path

from ptq161.files.hashing import sha256_of_file
from ptq161.run.contents import identity, text_files
from ptq161.run.preflight import checked_config
from tests.run.test_preflight import composed


def test_text_files_are_recorded_by_content(tmp_path: Path, tiny_model_dir: Path) -> None:
    calibration, training = tmp_path / "calib.txt", tmp_path / "train.txt"
    calibration.write_text("Text to calibrate on.")
    training.write_text("Text to train on.")
    config = composed(str(tiny_model_dir), str(calibration), str(calibration))
    content = identity(checked_config(config, []))
    assert text_files(content) == {"calib": sha256_of_file(calibration)}
    corpora = ["squad: 0123", sha256_of_file(training)]
    for group in ("preprocess", "finetune"):
        assert text_files({**content, group: {"corpora": corpora}})[group] == corpora[1]
    untrained = {"preprocess": None, "finetune": None}
    assert text_files({"calibration": {"text": "squad: 0123"}, **untrained}) == {}
    assert text_files({"calibration": None, **untrained}) == {}
