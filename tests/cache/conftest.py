from __future__ import annotations

from pathlib import Path

import pytest

from ptq161.tracking.read import RunData, read_run
from tests.cache.runs import Run, execute
from tests.conftest import _tiny_model, _tiny_tokenizer


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    _tiny_model("llama", n_blocks=3).save_pretrained(folder)
    _tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def settings(model_dir: Path, tmp_path: Path) -> list[str]:
    text = tmp_path / "text.txt"
    text.write_text("".join(f"Line {i}: {i**2} squares and {i**3} cubes. " for i in range(200)))
    return [
        f"model.path={model_dir}",
        "calib=text_file",
        f"calib.text_file={text}",
        "calib.n_samples=4",
        "calib.seq_len=32",
        "eval=ppl",
        "eval.corpora=[text_file]",
        f"eval.text_file={text}",
        "eval.seq_len=32",
        "eval.max_windows=4",
        "eval.sample_tokens=2",
        "method.epochs=1",
        "tracker=none",
        "device=cpu",
        "dtype=float32",
    ]


@pytest.fixture
def run(settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run the pipeline in ``tmp_path/NAME`` with further overrides, and read its record."""
    monkeypatch.setenv("PTQ161_STORE", str(tmp_path / "store"))

    def run(name: str, *overrides: str) -> RunData:
        return read_run(execute([*settings, *overrides], tmp_path / name))

    return run
