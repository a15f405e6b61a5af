"""Records that were damaged or edited: every command that reads them tells so in a sentence, or reads the rest."""

from __future__ import annotations

import contextlib
import io
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from ptq161.errors import UserError
from ptq161.replay.__main__ import _read_finished, _replay
from ptq161.replay.compare import compare
from ptq161.report.__main__ import main as report
from ptq161.report.collect import collect
from ptq161.tracking.read import read_run
from ptq161.tracking.record import RunRecord
from ptq161.tracking.settings import TrackerConfig
from ptq161.watch.__main__ import main as watch
from ptq161.watch.snapshot import read_snapshot
from tests.damage import DAMAGES, EXCHANGES, Damage, Exchange
from tests.report.synthetic import write_records

FILES = ("config.yaml", "manifest.json", "results.json", "metrics.jsonl", "samples.jsonl")
ANY = st.one_of(DAMAGES, EXCHANGES, EXCHANGES)  # values of the wrong kind find the most
bounded = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished record with everything in it. Copy it before changing it."""
    folder = tmp_path_factory.mktemp("records")
    write_records(folder, 1, with_metrics=1)
    config = OmegaConf.to_container(OmegaConf.load(folder / "0" / "config.yaml"))
    results = read_run(folder / "0").results
    assert isinstance(config, dict) and results is not None
    with RunRecord.open(
        folder / "run", config=config, tracker=TrackerConfig("none"), seeds={"seed": 0}, job_name="test"
    ) as record:
        for block in range(2):
            record.metric("loss", 0.5 + block, block=block, epoch=0)
            record.metric("output_error", 0.25, linear=f"{block}.mlp.up_proj")
        record.sample("quantized", "a text")
        record.finish({key: value for key, value in results.items() if key != "schema_version"})
    assert read_run(folder / "run").problems == []
    return folder / "run"


@contextlib.contextmanager
def damaged(whole: Path, folder: Path, name: str, damage: Damage | Exchange) -> Iterator[Path]:
    run_dir = Path(shutil.copytree(whole, folder / "sweep" / "0"))
    damage(run_dir / name, [run_dir / other for other in FILES if other != name])
    yield run_dir
    shutil.rmtree(folder)


def is_sentence(text: str) -> bool:
    return "\n" not in text and text.endswith(".")


@bounded
@given(name=st.sampled_from(FILES), damage=ANY)
def test_reading_finds_the_rest(
    whole: Path, tmp_path_factory: pytest.TempPathFactory, name: str, damage: Damage | Exchange
) -> None:
    intact = read_run(whole)
    with damaged(whole, tmp_path_factory.mktemp("damaged"), name, damage) as run_dir:
        try:
            found = read_run(run_dir)
        except UserError as error:
            assert is_sentence(str(error)) and name in str(error)
            return
        assert all(is_sentence(problem) for problem in found.problems)
        parts = {"config.yaml": "config", "manifest.json": "manifest", "results.json": "results"}
        for file, part in {**parts, "metrics.jsonl": "metrics", "samples.jsonl": "samples"}.items():
            assert file == name or getattr(found, part) == getattr(intact, part)


@bounded
@given(name=st.sampled_from(FILES), damage=ANY)
def test_a_table_of_runs_is_shown(
    whole: Path, tmp_path_factory: pytest.TempPathFactory, name: str, damage: Damage | Exchange
) -> None:
    with damaged(whole, tmp_path_factory.mktemp("damaged"), name, damage) as run_dir:
        problems = [*read_snapshot(run_dir.parent).problems, *collect([run_dir.parent]).problems]
        assert not any("\n" in problem for problem in problems)
        with contextlib.redirect_stdout(io.StringIO()):
            assert watch([str(run_dir.parent), "--once"]) == 0


@settings(bounded, max_examples=8)
@given(name=st.sampled_from(FILES[:3]), damage=ANY)
def test_a_report_is_made_of_the_others(
    whole: Path, tmp_path_factory: pytest.TempPathFactory, name: str, damage: Damage | Exchange
) -> None:
    with damaged(whole, tmp_path_factory.mktemp("damaged"), name, damage) as run_dir:
        out = run_dir.parents[1] / "out"
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            assert report([str(run_dir), str(whole), "--out", str(out)]) == 0
        assert (out / "table.md").exists()


@bounded
@given(name=st.sampled_from(FILES), damage=ANY)
def test_a_comparison_is_made_or_refused(
    whole: Path, tmp_path_factory: pytest.TempPathFactory, name: str, damage: Damage | Exchange
) -> None:
    with damaged(whole, tmp_path_factory.mktemp("damaged"), name, damage) as run_dir:
        try:
            recorded = _read_finished(run_dir)
        except UserError as error:
            assert is_sentence(str(error))
            return
        intact = read_run(whole)
        lost = [line["name"] for line in intact.metrics if line["name"] not in {m["name"] for m in recorded.metrics}]
        for pair in ((recorded, intact), (intact, recorded)):
            found = compare(*pair)
            assert not lost or found.missing or found.extra


@bounded
@given(damage=ANY)
def test_a_configuration_is_replayed_or_refused(
    whole: Path, tmp_path_factory: pytest.TempPathFactory, damage: Damage | Exchange
) -> None:
    """The model of this record is nowhere, so nothing is computed: what is checked before has to end in a sentence."""
    with damaged(whole, tmp_path_factory.mktemp("damaged"), "config.yaml", damage) as run_dir:
        with pytest.raises(UserError) as caught:
            _replay(_read_finished(run_dir), run_dir / "out")
        assert is_sentence(str(caught.value))
