"""The search: its trials under failures, kills and company, and the front. Runs are played by a script."""

from __future__ import annotations

import argparse
import csv
import json
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from optuna.distributions import FloatDistribution, IntDistribution
from optuna.trial import TrialState

from ptq161.errors import UserError
from ptq161.search import trials
from ptq161.search.__main__ import _direction, _parser, _prepare, main
from ptq161.search.front import front_figure, front_table, pareto_front, trials_frame, write_front
from ptq161.search.space import as_overrides
from ptq161.search.trials import Search, _command, claim_trial, open_search, run_trial
from tests.search.test_space import space_file

PARSER = OverridesParser.create()
SPACE = {"x": FloatDistribution(0.0, 1.0), "n": IntDistribution(1, 8)}
FAKE_RUN = """
import json, os, pathlib, signal, sys, time
typed = dict(item.lstrip("+").split("=", 1) for item in sys.argv[1:])
folder, act = pathlib.Path(typed["hydra.run.dir"].strip("'")), typed.get("act", "")
begun = folder / "begun"
attempt = len(begun.read_text()) if begun.exists() else 0
folder.mkdir(parents=True, exist_ok=True)
begun.write_text("." * (attempt + 1))
x = float(typed["x"])

def end(state, message=None):
    error = message and {"type": "UserError", "message": message}
    manifest = {"schema_version": 1, "exit_state": state, "exception": error, "duration_seconds": 2.5}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "config.yaml").write_text("{}")

if act == "say":
    sys.exit("first line\\nthe reason\\n")
if act == "fail":
    end("failed", "the loss of block 3 is not finite")
    sys.exit(1)
if act == "killed" or (act == "killed once" and attempt == 0):
    os.kill(os.getpid(), signal.SIGKILL)
if act == "slow" and attempt == 0:
    time.sleep(60)
metrics = {"bits": 1 + x, "ppl/a@8": None if act == "nan" else 10 - 5 * x + (x > 0.5)}
results = {"schema_version": 1, "metrics": metrics}
if act == "nan":
    results = {**results, "nonfinite": {"metrics": {"ppl/a@8": "nan"}}}
(folder / "results.json").write_text(json.dumps(results))
end("finished")
"""

Open = Callable[..., Search]


@pytest.fixture
def opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Open:
    """Open a search in ``tmp_path/search`` whose runs the script plays; ``act`` says how."""
    script = tmp_path / "run.py"
    script.write_text(FAKE_RUN)
    monkeypatch.setattr(trials, "_RUN", (sys.executable, str(script)))

    def open_(act: str = "", **changes: Any) -> Search:
        folder, overrides = tmp_path / "search", [f"act={act}"] if act else []
        return open_search(folder, SPACE, ("bits", "ppl/a@8"), ["minimize"] * 2, overrides, **changes)

    return open_


def run_all(search: Search, n_trials: int) -> list[trials.Outcome]:
    outcomes = []
    while claim := claim_trial(search, n_trials):
        outcomes.append(run_trial(search, claim))
    return outcomes


def states(search: Search) -> list[TrialState]:
    return [trial.state for trial in search.study.get_trials(deepcopy=False)]


# Trials


def test_trials_are_runs_and_their_values_are_in_the_study(opened: Open) -> None:
    search = opened(first={"x": 0.25, "n": 4})
    outcomes = run_all(search, 3)
    assert outcomes[0].values == (1.25, 8.75) and outcomes[0].seconds == 2.5
    assert states(search) == [TrialState.COMPLETE] * 3
    assert all((search.run_dir(number) / "results.json").exists() for number in range(3))
    assert claim_trial(search, 3) is None
    assert len(run_all(opened(first={"x": 0.25, "n": 4}), 4)) == 1  # a larger number adds to the same study


def test_the_command_is_a_run_in_the_trials_directory(opened: Open) -> None:
    search = opened("fail")
    claim = claim_trial(search, 1)
    assert claim is not None
    *_, act, group, run_dir = _command(search, claim)
    assert as_overrides(claim.values) == _command(search, claim)[2:4]
    assert (act, group) == ("act=fail", "++tracker.group=search/search")
    assert PARSER.parse_override(run_dir).value() == str(search.folder / "0")
    search.overrides.append("tracker.group=mine")
    assert "++tracker.group=search/search" not in _command(search, claim)
    os.close(claim.lock)


def test_the_points_follow_from_the_seed_even_when_a_search_is_taken_up_again(opened: Open, tmp_path: Path) -> None:
    def points(*stops: int, seed: int = 0) -> list[dict[str, Any]]:
        for stop in stops:
            run_all(search := opened(seed=seed), stop)
        params = [trial.params for trial in search.study.trials]
        (tmp_path / "search").rename(tmp_path / f"search{time.monotonic_ns()}")
        return params

    at_once = points(4)
    assert points(1, 3, 4) == at_once
    assert points(4, seed=1) != at_once


@pytest.mark.parametrize(
    ("act", "reason"),
    [
        ("fail", "the loss of block 3 is not finite"),
        ("say", "the reason"),
        ("nan", "ppl/a@8 is nan"),
        ("killed", "killed by SIGKILL 2 times"),
    ],
)
def test_a_failed_trial_is_recorded_with_its_reason_and_the_next_one_runs(opened: Open, act: str, reason: str) -> None:
    search = opened(act)
    outcomes = run_all(search, 2)
    assert [(outcome.values, outcome.reason) for outcome in outcomes] == [(None, reason)] * 2
    assert states(search) == [TrialState.FAIL] * 2
    if act in ("fail", "nan"):
        (row, _) = csv.DictReader(trials_frame(search).to_csv().splitlines())
        assert (row["state"], row["reason"], row["pareto_front"]) == ("fail", reason, "no")
        assert (row["bits"], row["run_dir"]) == ("", str(search.run_dir(0)))


def test_a_killed_run_is_begun_once_more(opened: Open) -> None:
    search = opened("killed once")
    (outcome,) = run_all(search, 1)
    assert outcome.values is not None
    assert (search.run_dir(0) / "begun").read_text() == ".."


def test_a_result_that_is_not_measured_ends_the_search(opened: Open, tmp_path: Path) -> None:
    opened()
    search = open_search(tmp_path / "other", SPACE, ("bits", "zero_shot/a/acc"), ["minimize", "maximize"], [])
    with pytest.raises(UserError, match=r"--objectives zero_shot/a/acc: trial 0 .* it measured bits, ppl/a@8"):
        run_all(search, 2)


def work(search_of: Open, n_trials: int) -> None:
    run_all(search_of(), n_trials)


def test_processes_share_a_search(opened: Open) -> None:
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=work, args=(opened, 9)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    search = opened()
    assert states(search) == [TrialState.COMPLETE] * 9
    assert [(search.run_dir(number) / "begun").read_text() for number in range(9)] == ["."] * 9
    assert len({json.dumps(trial.params) for trial in search.study.trials}) == 9


def begin_slow_trial(opened: Open) -> tuple[Any, int, Search]:
    """Start a process that works on a trial, and return it, its run's process id, and the search as others see it."""
    process = multiprocessing.get_context("fork").Process(target=run_all, args=(opened("slow"), 1))
    process.start()
    search = opened("slow")
    deadline = time.monotonic() + 30
    while not (search.run_dir(0) / "begun").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    (child,) = (int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split())
    return process, child, search


def test_a_trial_is_taken_over_when_nothing_runs_it_any_more(opened: Open) -> None:
    process, child, search = begin_slow_trial(opened)
    assert claim_trial(search, 1) is None  # it is someone else's
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert claim_trial(search, 1) is None  # its run still goes on
    os.kill(child, signal.SIGKILL)
    deadline = time.monotonic() + 30
    while (claim := claim_trial(search, 1)) is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert claim.number == 0
    assert run_trial(search, claim).values is not None
    assert states(search) == [TrialState.COMPLETE]
    assert (search.run_dir(0) / "begun").read_text() == ".."


def test_a_run_that_outlived_its_search_is_counted_and_not_repeated(opened: Open) -> None:
    search = opened()
    claim = claim_trial(search, 1)
    assert claim is not None
    trials._run(_command(search, claim), search.run_dir(0), claim.lock, {})
    os.close(claim.lock)  # killed before it could tell the study
    assert [outcome.values is None for outcome in run_all(opened(), 1)] == [False]
    assert (search.run_dir(0) / "begun").read_text() == "."


@pytest.fixture
def heeds_sigint() -> Iterator[None]:
    """A shell lets the processes that it starts in the background ignore SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heeds_sigint")
def test_an_interrupted_search_ends_its_run_and_keeps_the_trial(opened: Open) -> None:
    search = opened("slow")
    claim = claim_trial(search, 1)
    assert claim is not None
    timer = threading.Timer(1.5, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run_trial(search, claim)
    assert time.monotonic() - began < 20
    assert states(search) == [TrialState.RUNNING]
    assert [outcome.values is None for outcome in run_all(opened("slow"), 1)] == [False]


def test_a_folder_holds_one_search(opened: Open, tmp_path: Path) -> None:
    opened()
    with pytest.raises(UserError, match=r"--out .* another value of the settings, \[\]"):
        opened("fail")
    with pytest.raises(UserError, match=r"another value of --objectives"):
        open_search(tmp_path / "search", SPACE, ("bits", "other"), ["minimize"] * 2, [])
    with pytest.raises(UserError, match=r"another value of --space"):
        open_search(tmp_path / "search", {"x": SPACE["x"]}, ("bits", "ppl/a@8"), ["minimize"] * 2, [])


def test_a_damaged_study_is_one_sentence(opened: Open, tmp_path: Path) -> None:
    opened()
    with (tmp_path / "search" / trials._JOURNAL).open("a") as file:
        file.write('{"op_code": \n{}\n')
    with pytest.raises(UserError, match=r"study\.journal is damaged"):
        opened()


# The front


def test_the_front_is_what_no_trial_beats(opened: Open) -> None:
    search = opened()
    run_all(search, 8)
    front = pareto_front(search)
    done = [tuple(trial.values) for trial in search.study.trials]
    beaten = [v for v in done if any(o != v and o[0] <= v[0] and o[1] <= v[1] for o in done)]
    values = list(front[["bits", "ppl/a@8"]].itertuples(index=False, name=None))
    assert sorted(values) == values == sorted(v for v in done if v not in beaten)
    assert front_table(search).row_count == len(front)
    files = write_front(search)
    assert {path.name for path in files} == {"trials.csv", "pareto.csv", "pareto.svg", "pareto.png"}
    rows = list(csv.DictReader((search.folder / "trials.csv").read_text().splitlines()))
    header = "trial bits ppl/a@8 x n pareto_front state seconds reason run_dir"
    assert list(rows[0]) == header.split()
    assert [float(row["bits"]) for row in rows] == [values[0] for values in done]
    assert [row["n"] for row in rows] == [str(trial.params["n"]) for trial in search.study.trials]
    assert {(row["state"], row["seconds"], row["reason"]) for row in rows} == {("complete", "2.5", "")}
    assert {row["trial"] for row in rows if row["pareto_front"] == "yes"} == set(front.trial.astype(str))
    assert len((search.folder / "pareto.csv").read_text().splitlines()) == 1 + len(front)
    assert b"Pareto front" in (search.folder / "pareto.svg").read_bytes()
    assert (search.folder / "pareto.png").read_bytes().startswith(b"\x89PNG")


def test_the_figure_has_the_front_as_a_line_and_its_trials_by_number(opened: Open) -> None:
    search = opened()
    run_all(search, 8)
    front = pareto_front(search)
    others, line, points = front_figure(search).data
    assert (others.name, line.name) == ("trial", "Pareto front")
    assert list(line.x) == list(points.x) == list(front.bits) and list(line.y) == list(front["ppl/a@8"])
    assert list(points.text) == [str(number) for number in front.trial]
    assert len(others.x) == 8 - len(front)
    assert front_figure(search).layout.yaxis.type == "log"


def test_a_running_trial_is_in_the_table_and_not_in_the_figure(opened: Open) -> None:
    search = opened()
    run_all(search, 1)
    claim = claim_trial(search, 2)
    assert claim is not None
    *_, row = csv.DictReader(trials_frame(search).to_csv().splitlines())
    assert (row["state"], row["pareto_front"], row["seconds"], row["reason"]) == ("running", "no", "", "")
    assert [len(trace.x) for trace in front_figure(search).data] == [1, 1]  # the front of one trial
    os.close(claim.lock)


# The program


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        ("bits_per_weight", "minimize"),
        ("checkpoint_bytes", "minimize"),
        ("ppl/boolq@512", "minimize"),
        ("zero_shot/lambada/perplexity", "minimize"),
        ("zero_shot/piqa/acc", "maximize"),
    ],
)
def test_which_way_a_result_improves(metric: str, expected: str) -> None:
    assert _direction(metric) == expected


def options(folder: Path, *arguments: str) -> argparse.Namespace:
    return _parser().parse_intermixed_args(["--out", str(folder / "out"), *arguments])


def test_by_default_bits_and_the_first_perplexity_are_searched_from_the_configured_point(tmp_path: Path) -> None:
    search = _prepare(options(tmp_path, "eval.corpora=[lambada,boolq]", "tracker=none"))
    assert search.objectives == ("bits_per_weight", "ppl/lambada@512")
    (first,) = search.study.trials
    assert first.state == TrialState.WAITING
    assert first.system_attrs["fixed_params"]["mask_ratio"] == 0.2
    search = _prepare(options(tmp_path / "2", "--objectives", "linear_bytes", "zero_shot/piqa/acc"))
    assert [d.name for d in search.study.directions] == ["MINIMIZE", "MAXIMIZE"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--trials", "0"], "--trials 0: use at least 1"),
        (["--seed", "-1"], "--seed -1"),
        (["nothing=1"], "no trial can run with nothing=1"),
        (["seed=0,1"], "no trial can run with seed=0,1"),
        (["block_size=0"], "block_size=0: use at least 1"),
        (["mask_ratio=0.3"], "mask_ratio=0.3: the search varies mask_ratio"),
        (["hydra.run.dir=x"], "hydra.run.dir=x: a search does not accept hydra.run.dir"),
        (["+study=mask_ratio"], r"\+study=mask_ratio: a search does not accept study"),
        (["method=rtn"], "no trial can run with method=rtn .*method.epochs"),
        (["eval.corpora=[]"], "name two results with --objectives"),
        (["--objectives", "bits_per_weight", "ppl/c4@512"], "--objectives ppl/c4@512: no run .* ppl/boolq@512"),
        (["--objectives", "bits_per_weight", "bits_per_weight"], "name two different results"),
    ],
)
def test_what_is_wrong_is_one_sentence_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture, arguments: list[str], sentence: str
) -> None:
    assert main(["--out", str(tmp_path / "out"), *arguments]) == 1
    printed = capsys.readouterr()
    assert len(printed.err.splitlines()) == 1 and printed.out == ""
    assert re.search(sentence, printed.err)
    assert not (tmp_path / "out").exists()


def test_a_corner_that_cannot_run_is_found_before_any_work(tmp_path: Path) -> None:
    file = space_file(tmp_path, "mask_ratio: {low: 0.1, high: 1.0}\nmethod: {choices: [ptq161, pb_llm]}\n")
    with pytest.raises(UserError, match=r"a trial with mask_ratio=1.0 method=ptq161 cannot run: mask_ratio=1.0: use"):
        _prepare(options(tmp_path, "--space", str(file)))
    assert not (tmp_path / "out").exists()
