"""`python run.py preprocess=...` on the tiny model: its record, its refusals, and a run that was killed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ptq161.tracking.read import read_run
from tests.end_to_end.conftest import Ended, Program, killed_and_typed_again
from tests.tracking.wandb_file import read_wandb_file

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    file = tmp_path_factory.mktemp("training") / "training.txt"
    file.write_text("".join(f"Row {i}: {7 * i} is seven times {i}. " for i in range(400)))
    settings = f"corpora=[text_file] text_file={file} steps=4 batch_size=2 seq_len=64 rank=4 checkpoint_every=2"
    return ["preprocess=restorative_lora", *(f"preprocess.{setting}" for setting in settings.split())]


@pytest.fixture(scope="module")
def restored(
    tmp_path_factory: pytest.TempPathFactory, tiny: list[str], training: list[str]
) -> tuple[Ended, Path, list[str]]:
    program = Program(tmp_path_factory.mktemp("restored"), tiny)
    # Fresh masks, so that the merged folder alone says what comes out.
    settings = [
        "preprocess.objective=kl",
        "preprocess.rounds=2",
        "preprocess.save_merged=true",
        "preprocess.mask=fresh",
    ]
    overrides = [*tiny, *training, *settings]
    ended = program(*overrides, "hydra.run.dir=run")
    assert ended.status == 0, ended.stderr
    return ended, program.folder / "run", overrides


def test_the_record_has_the_curve_and_the_merged_model(restored: tuple[Ended, Path, list[str]]) -> None:
    ended, run_dir, _ = restored
    run = read_run(run_dir)
    assert run.problems == [] and run.results is not None
    for name in ("preprocess_loss", "preprocess_lr", "preprocess_tokens_per_second"):
        steps = [(m["round"], m["step"]) for m in run.metrics if m["name"] == name]
        assert steps == [(r, s) for r in range(2) for s in range(4)]
    merged = run.results["merged"]
    assert set(run.results["full_precision"]) == set(merged)
    (ppl,) = (name for name in merged if name.startswith("ppl/"))
    assert len({run.results[part][ppl] for part in ("full_precision", "merged", "metrics")}) == 3
    assert {m.get("model") for m in run.metrics if m["name"] == ppl} == {"full precision", "merged", "quantized"}
    assert set(run.results["seconds"]) == {"load", "full_precision", "preprocess", "merged", "quantize", "evaluate"}
    assert run.manifest["preprocess"]["preprocess"]["rounds"] == 2
    assert "restore: 100%" in ended.stderr and "tokens/s" in ended.stderr
    header = next(line for line in ended.stdout.splitlines() if "full precision" in line and "metric" in line)
    assert "merged" in header


def test_the_mirror_draws_a_curve_per_round(restored: tuple[Ended, Path, list[str]]) -> None:
    mirror = read_wandb_file(restored[1])
    rows = [row for row in mirror.history if "preprocess_loss/round_01" in row]
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    run = read_run(restored[1])
    assert run.results is not None
    (ppl,) = (name for name in run.results["merged"] if name.startswith("ppl/"))
    assert mirror.summary[f"merged/{ppl}"] == run.results["merged"][ppl]


def test_the_merged_folder_quantizes_to_the_same_bytes(
    restored: tuple[Ended, Path, list[str]], program: Program
) -> None:
    run_dir = restored[1]
    ended = program(*program.tiny, f"model.path={run_dir / 'merged'}", "tracker=none", "hydra.run.dir=again")
    assert ended.status == 0, ended.stderr
    found, expected = (
        load_file(folder / "checkpoint/packed.safetensors") for folder in (program.folder / "again", run_dir)
    )
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


def test_a_killed_training_goes_on(restored: tuple[Ended, Path, list[str]], program: Program) -> None:
    """To the same weights, and without training again what was done."""
    _, run_dir, overrides = restored
    expected = read_run(run_dir).manifest["merged_sha256"]
    command = [*overrides, "tracker=none", "seed=1"]
    found, same = killed_and_typed_again(program, command, '"round": 1, "step": 2')
    assert found.manifest["merged_sha256"] == same.manifest["merged_sha256"] != expected
    losses = [[m["value"] for m in run.metrics if m["name"] == "preprocess_loss"] for run in (found, same)]
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (
            ["method=none"],
            "preprocess=restorative_lora: method=none quantizes nothing; choose a method, or preprocess=none.",
        ),
        (["preprocess.steps=0"], "preprocess.steps=0: use at least 1."),
        (
            ["preprocess.text_file=nowhere"],
            "preprocess.text_file={folder}/nowhere: there is no such file; give a UTF-8 text file.",
        ),
        (
            ["preprocess.seq_len=1024"],
            "preprocess.seq_len=1024: the model takes at most 512 tokens; set preprocess.seq_len to at most 512.",
        ),
        (["+preprocess.color=1"], "unknown key preprocess.color: known are arithmetic, bits, "),
    ],
)
def test_refusals_are_one_sentence(program: Program, training: list[str], overrides: list[str], sentence: str) -> None:
    ended = program(*program.tiny, *training, "tracker=none", *overrides)
    assert ended.status == 1 and "Traceback" not in ended.stderr
    (printed,) = ended.sentences
    assert printed.startswith(sentence.replace("{folder}", str(program.folder)))


def test_training_on_what_is_scored_is_refused(program: Program, training: list[str]) -> None:
    scored = next(o.partition("=")[2] for o in program.tiny if o.startswith("eval.text_file="))
    ended = program(*program.tiny, *training, f"preprocess.text_file={scored}")
    sentence = "is the file of eval.text_file as well: train on another text."
    assert ended.sentences == [f"preprocess.text_file={scored} {sentence}"]


def test_packed_checkpoints_are_not_restored(
    restored: tuple[Ended, Path, list[str]], program: Program, training: list[str]
) -> None:
    ended = program(*program.tiny[-6:], *training, f"model.path={restored[1] / 'checkpoint'}")
    (printed,) = ended.sentences
    assert printed.startswith("preprocess=restorative_lora: the model ") and "already quantized" in printed
