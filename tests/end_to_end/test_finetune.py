"""`python run.py finetune=...` on the tiny model: its record, its checkpoint, its refusals, and a killed training."""

from __future__ import annotations

from pathlib import Path

import pytest

from ptq161.report.collect import collect
from ptq161.report.results import results_of
from ptq161.tracking.read import read_run
from tests.end_to_end.conftest import Ended, Program, killed_and_typed_again

pytestmark = pytest.mark.slow

SHORT = "steps=4 batch_size=2 seq_len=64 held_out=2 held_out_every=2 checkpoint_every=2 lr=0.01 code_lr=0.01"


@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    file = tmp_path_factory.mktemp("training") / "training.txt"
    file.write_text("".join(f"Row {i}: {7 * i} is seven times {i}. " for i in range(400)))
    settings = f"corpora=[text_file] text_file={file} {SHORT}"
    return ["finetune=codes", "method=waterfill", "method.epochs=1", *(f"finetune.{s}" for s in settings.split())]


@pytest.fixture(scope="module")
def finetuned(
    tmp_path_factory: pytest.TempPathFactory, tiny: list[str], training: list[str]
) -> tuple[Ended, Path, list[str]]:
    program = Program(tmp_path_factory.mktemp("finetuned"), tiny)
    overrides = [*tiny, *training]
    ended = program(*overrides, "hydra.run.dir=run")
    assert ended.status == 0, ended.stderr
    return ended, program.folder / "run", overrides


def test_the_record_has_the_curve_and_both_scores(finetuned: tuple[Ended, Path, list[str]]) -> None:
    ended, run_dir, _ = finetuned
    run = read_run(run_dir)
    assert run.problems == [] and run.results is not None
    for name in ("finetune_loss", "finetune_lr", "finetune_tokens_per_second"):
        assert [m["step"] for m in run.metrics if m["name"] == name] == [0, 1, 2, 3]
    held_out = [(m["step"], m["value"]) for m in run.metrics if m["name"] == "finetune_held_out_loss"]
    assert [step for step, _ in held_out] == [0, 2, 4] and min(held_out[1:], key=lambda m: m[1])[1] < held_out[0][1]
    before, after = run.results["before_finetune"], run.results["metrics"]
    (ppl,) = (name for name in after if name.startswith("ppl/"))
    assert before.keys() == after.keys() and before[ppl] != after[ppl]
    assert before["bits_per_weight"] == after["bits_per_weight"] and before["linear_bytes"] == after["linear_bytes"]
    labels = {m.get("model") for m in run.metrics if m["name"] == ppl}
    assert labels == {"full precision", "before finetuning", "quantized"}
    stages = {"load", "full_precision", "quantize", "before_finetune", "finetune", "evaluate"}
    assert set(run.results["seconds"]) == stages
    assert set(run.manifest["text_files"]) == {"calib", "finetune"}
    assert "finetune: 100%" in ended.stderr and "tokens/s" in ended.stderr
    header = next(line for line in ended.stdout.splitlines() if "full precision" in line and "metric" in line)
    assert "quantized" in header and "finetuned" in header


def test_the_report_has_a_row_for_each(finetuned: tuple[Ended, Path, list[str]]) -> None:
    rows = results_of(collect([finetuned[1]]).runs).rows
    assert rows.method.tolist() == ["none", "waterfill+finetuning", "waterfill"]
    texts = rows.calibration_text.tolist()
    assert [text.count("text_file ") for text in texts] == [0, 2, 1]


def test_the_checkpoint_is_the_finetuned_model(finetuned: tuple[Ended, Path, list[str]], program: Program) -> None:
    run_dir = finetuned[1]
    command = [f"model.path={run_dir / 'checkpoint'}", "tracker=none", "hydra.run.dir=scored"]
    ended = program(*_without_calibration(program), *command)
    assert ended.status == 0, ended.stderr
    found, expected = (read_run(folder).results for folder in (program.folder / "scored", run_dir))
    assert found is not None and expected is not None
    (ppl,) = (name for name in expected["metrics"] if name.startswith("ppl/"))
    assert found["metrics"][ppl] == expected["metrics"][ppl]


def test_a_killed_finetuning_goes_on(finetuned: tuple[Ended, Path, list[str]], program: Program) -> None:
    """To the same bytes, and without training again what was done."""
    command = [*finetuned[2], "tracker=none", "seed=1"]
    found, same = killed_and_typed_again(program, command, '"finetune_loss"', '"step": 2')
    assert found.manifest["checkpoint_sha256"] == same.manifest["checkpoint_sha256"]
    losses = [[m["value"] for m in run.metrics if m["name"] == "finetune_loss"] for run in (found, same)]
    assert losses[0] == losses[1]


def test_the_text_may_be_the_models_own(program: Program) -> None:
    settings = [f"finetune.{s}" for s in f"text=self {SHORT}".split()]
    command = [*program.tiny, "method=rtn", "finetune=scales", *settings, "tracker=none", "eval.full_precision=false"]
    ended = program(*command, "hydra.run.dir=first")
    assert ended.status == 0 and "sample: 100%" in ended.stderr, ended.stderr
    again = program(*command, "finetune.score_before=false", "hydra.run.dir=again")
    assert again.status == 0 and "sample:" not in again.stderr, again.stderr  # the text was kept
    first, second = (read_run(program.folder / name).results for name in ("first", "again"))
    assert first is not None and second is not None and "before_finetune" not in second
    assert first["metrics"] == second["metrics"]
    (run,) = collect([program.folder / "first"]).runs
    assert run.method == "rtn+finetuning" and "sampled from the model" in run.calibration_text


def test_what_only_model_and_text_show_is_one_sentence_too(program: Program) -> None:
    ended = program(*program.tiny, "tracker=none", "finetune=scales", "finetune.seq_len=4096")
    assert ended.status == 1 and "Traceback" not in ended.stderr
    (printed,) = ended.sentences
    assert printed.startswith("finetune.seq_len=4096: the model takes at most ")


def test_packed_checkpoints_are_not_finetuned(finetuned: tuple[Ended, Path, list[str]], program: Program) -> None:
    command = [f"model.path={finetuned[1] / 'checkpoint'}", "finetune=scales"]
    (printed,) = program(*_without_calibration(program), *command).sentences
    assert printed.startswith("finetune=scales: the model ") and "already quantized" in printed


def test_adapters_on_a_stored_checkpoint(
    finetuned: tuple[Ended, Path, list[str]], program: Program, training: list[str]
) -> None:
    """Trained on a file, scored before and after, stored beside the packed weights, and applied when it is loaded."""
    (file,) = (setting for setting in training if setting.startswith("finetune.text_file="))
    settings = ["steps=4", "batch_size=2", "seq_len=64", "rank=4", "lr=0.01", "held_out=2"]
    base = [*_without_calibration(program), "tracker=none"]
    command = [f"model.path={finetuned[1] / 'checkpoint'}", "finetune=gsq_tuning", file]
    ended = program(*base, *command, *(f"finetune.{s}" for s in settings), "hydra.run.dir=tuned")
    assert ended.status == 0, ended.stderr
    tuned = read_run(program.folder / "tuned")
    assert tuned.results is not None and set(tuned.manifest["text_files"]) == {"finetune"}
    before, after = tuned.results["before_finetune"], tuned.results["metrics"]
    (ppl,) = (name for name in after if name.startswith("ppl/"))
    assert before.keys() == after.keys() and before[ppl] != after[ppl]
    assert before["bits_per_weight"] < after["bits_per_weight"]
    assert len([m for m in tuned.metrics if m["name"] == "finetune_loss"]) == 4
    assert {"finetune_trained_bytes", "finetune_base_bytes"} <= {m["name"] for m in tuned.metrics}
    again = program(*base, f"model.path={program.folder / 'tuned' / 'checkpoint'}", "hydra.run.dir=again")
    assert again.status == 0, again.stderr
    scored = read_run(program.folder / "again").results
    assert scored is not None and scored["metrics"] == after


def _without_calibration(program: Program) -> list[str]:
    return [override for override in program.tiny if not override.startswith(("model.path", "calib"))]
