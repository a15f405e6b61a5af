"""Studies of conf/study run on a tiny model, and become a table and a figure from the records alone; all compose."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from ptq161.report.__main__ import main
from ptq161.report.collect import collect
from ptq161.run.preflight import checked_config
from tests.end_to_end.conftest import Program

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
METHODS = ["none", "rtn", "gptq", "awq", "quip", "omniquant", "pb_llm", "billm"]
METHODS += ["quant_dllm", "vptq_1_5", "vptq_1_6", "qdrop", "ptq161", "waterfill"]


@dataclasses.dataclass(frozen=True)
class Study:
    """What a study should be.

    Attributes:
        runs: what tells its runs apart, by key, a value per run.
        x: the figure's axis; None leaves it to the report.
        overrides: what keeps it small, after those of the tiny model.
        keeps_calibration: its calibration is its own, not that of the tiny model.
        axes: folders of the sweep that make a figure each, with its axis.
    """

    runs: Mapping[str, list[Any]]
    x: str | None = None
    overrides: tuple[str, ...] = ()
    keeps_calibration: bool = False
    axes: Mapping[str, str] = dataclasses.field(default_factory=dict)


STUDIES = {
    "baselines": Study({"method": METHODS}),
    "mask_ratio": Study({"mask_ratio": [0, 0.05, 0.1, 0.2, 0.3]}),
    "saliency": Study({"method.saliency": ["max", "mean", "hessian", "magnitude", "random"]}, x="method.saliency"),
    "block_size": Study({"block_size": [1, 2, 4]}),
    "components": Study(
        {
            "method": [
                "binarized",
                "mask",
                "mask+scales",
                "mask+scales+angles",
                "mask+scales+angles+cosine",
                "mask+scales+angles+cosine+preprocessing",
                "binarized+preprocessing",
                "mask+scales+angles+preprocessing",
            ],
            "mask_ratio": [0, 0.2, 0.2, 0.2, 0.2, 0.2, 0, 0.2],
        },
        x="method",
    ),
    "preprocessing": Study(
        {
            "method": [name for method in ("rtn", "ptq161") for name in (method, f"{method}+preprocessing")],
            "preprocess": ["none", "restorative_lora"] * 2,
        },
        x="method",
        overrides=("method=rtn,ptq161",),  # a method of each kind; baselines has them all
    ),
    "objectives": Study(
        {
            "preprocess.objective": ["lm", "lm", "kl", "kl", "kl_hidden", "kl_hidden"],
            "preprocess.lr": [0.001, 0.003] * 3,
        },
        x="preprocess.lr",
        overrides=("preprocess.lr=0.001,0.003",),
    ),
    "restoration": Study(
        {
            "preprocess": ["none", "lora", "lora, fresh mask", "lora, two rounds", "full"],
            "preprocess.rounds": [None, 1, 1, 2, 1],
            "preprocess.mask": [None, "first", "fresh", "first", "first"],
            "preprocess.update": [None, "lora", "lora", "lora", "full"],
        },
        x="preprocess",
        overrides=("++preprocess.steps=1",),
    ),
    "waterfill": Study(
        {
            "method": [
                "ptq161",
                "compensated",
                "learned",
                "allotted",
                "waterfill",
                "waterfill+finetuning",
                "waterfill+finetuning",
            ],
            "finetune": ["none"] * 5 + ["scales", "codes"],
        },
        x="method",
        overrides=("method.epochs=1",),
    ),
    "finetune": Study(
        {"finetune": ["scales", "scales", "codes", "codes"], "finetune.steps": [1, 2, 1, 2]},
        x="finetune.steps",
        overrides=("method.epochs=0", "finetune.steps=1,2"),
    ),
    "equal_bytes": Study(
        {
            "method": ["ptq161", "ptq161+finetuning", "learned", "waterfill+finetuning", "billm"],
            "finetune": ["none", "scales", "none", "codes", "none"],
        },
        overrides=("+study/equal_bytes=released,scales,learned,distilled,billm",),
    ),
    "codebooks": Study({"method.codebook_per": ["linear", "input", "block"]}, x="method.codebook_per"),
    "arithmetic": Study(
        {
            "preprocess": ["lora", "float", "6 bits"],
            "preprocess.base": ["packed", "nf4", "nf4"],
            "preprocess.arithmetic": ["float", "float", "gse"],
            "preprocess.bits": [8, 8, 6],
        },
        x="preprocess",
        overrides=("+study/arithmetic=lora,float,bits_6", "method.epochs=0"),
    ),
    "metis": Study(
        {"preprocess.spectral_rank": [0, 2], "preprocess.format": ["mxfp4", "mxfp4"]},
        overrides=("preprocess.spectral_rank=0,2", "preprocess.format=mxfp4", "method.epochs=0"),
    ),
    "input_drop": Study(
        {"method.input_drop": [0, 0.25, 0.5]},
        x="method.input_drop",
        overrides=("method.epochs=1", "seed=0"),
    ),
    "adapters": Study(
        {
            "finetune": ["float", "8 bits", "5 bits"],
            "finetune.arithmetic": ["float", "gse", "gse"],
            "finetune.bits": [8, 8, 5],
        },
        x="finetune",
        overrides=("+study/adapters=float,bits_8,bits_5", "method.epochs=0"),
    ),
    "calibration": Study(
        {
            "calib": ["squad", "coqa", "squad", "squad"],
            "calib.n_samples": [8, 8, 2, 8],
            "calib.seq_len": [512, 512, 512, 128],
        },
        # A variant of each axis, none longer than the tiny model, and one seed.
        overrides=("+study/calibration=base,coqa,samples_2,length_128", "seed=0", "method.epochs=0"),
        keeps_calibration=True,
        axes={"set": "calib", "samples": "calib.n_samples", "length": "calib.seq_len"},
    ),
}


def test_every_study_is_here_and_described() -> None:
    assert set(STUDIES) == {path.stem for path in (ROOT / "conf" / "study").glob("*.yaml")}
    for study in STUDIES:
        text = (ROOT / "experiments" / study / "README.md").read_text()
        for needed in ("**Claim", "**Command.", f"+study={study}", f"--out experiments/{study}", "## What we measured"):
            assert needed in text, (study, needed)


@pytest.fixture(scope="module")
def small_conf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The configuration itself, but that each of its trainings is a step on a local text."""
    folder = tmp_path_factory.mktemp("small")
    text, conf = folder / "text.txt", folder / "conf"
    text.write_text("A text that nothing is scored on. " * 40)
    shutil.copytree(ROOT / "conf", conf)
    small = {"steps": 1, "batch_size": 1, "seq_len": 32, "corpora": ["text_file"], "text_file": str(text)}
    for training in ("preprocess/restorative_lora", "finetune/scales", "finetune/codes", "finetune/gsq_tuning"):
        file = conf / f"{training}.yaml"
        file.write_text(yaml.safe_dump({**yaml.safe_load(file.read_text()), **small}))
    return conf


RUN = ("baselines", "waterfill", "finetune", "equal_bytes", "calibration", "components")
"""Studies of which each runs something that the others do not; of the rest, the jobs alone are composed and checked."""


@pytest.mark.parametrize("name", [name for name in STUDIES if name not in RUN])
def test_the_jobs_of_a_study(name: str) -> None:
    study, parser = STUDIES[name], OverridesParser.create()
    with initialize_config_dir(str(ROOT / "conf"), version_base=None):
        whole = compose("config", [f"+study={name}"], return_hydra_config=True)
        given = {o.partition("=")[0]: o for o in study.overrides}
        params = {key: f"{key}={value}" for key, value in whole.hydra.sweeper.params.items()} | given
        (jobs,) = BasicSweeper.split_arguments(parser.parse_overrides(list(params.values())), max_batch_size=None)
        configs = [compose("config", [f"+study={name}", "tracker=none", *job]) for job in jobs]
    for config, job in zip(configs, jobs, strict=True):
        checked_config(config, [f"+study={name}", *job])
    for key, values in study.runs.items():
        assert [_value(config, key) for config in configs] == values


def _value(config: DictConfig, key: str) -> Any:
    """What the report tells runs apart by."""
    value = OmegaConf.select(config, key)
    if not isinstance(value, DictConfig):
        return value
    restored = key == "method" and config.preprocess.name != "none"
    return value.name + ("+preprocessing" if restored else "")


@pytest.mark.parametrize("name", RUN)
def test_a_study_from_its_command_to_its_figure(name: str, program: Program, small_conf: Path) -> None:
    study = STUDIES[name]
    tiny = [o for o in program.tiny if not (study.keeps_calibration and o.startswith("calib"))]
    sweep = program.folder / "sweep"
    ended = program(
        "--config-path",
        str(small_conf),
        "-m",
        f"+study={name}",
        *tiny,
        *study.overrides,
        "tracker=none",
        f"hydra.sweep.dir={sweep}",
    )
    assert ended.status == 0, ended.stderr
    found = collect([sweep])
    assert found.problems == []
    runs = sorted(found.runs, key=lambda run: int(run.run_dir.name if run.run_dir else ""))
    for key, values in study.runs.items():
        assert [run.value(key) for run in runs] == values
    reports = {axis: ([sweep / "base", sweep / axis], x) for axis, x in study.axes.items()} or {"": ([sweep], study.x)}
    for axis, (folders, x) in reports.items():
        out = program.folder / "out" / axis
        assert main([*map(str, folders), "--out", str(out), *(["--x", x] if x else [])]) == 0
        assert {"table.md", "results.csv", "figure.svg", "figure.png"} <= {path.name for path in out.iterdir()}


def test_a_study_is_a_sweep_without_the_switch_and_its_jobs_are_checked(program: Program) -> None:
    wrong = "hydra.sweeper.params.mask_ratio='0.1,1.5'"
    ended = program("+study=mask_ratio", *program.tiny, "tracker=none", wrong)
    assert ended.status == 1
    (sentence,) = ended.sentences
    assert "mask_ratio=1.5" in sentence and "of this sweep cannot run" in sentence
    assert list(program.folder.iterdir()) == []
