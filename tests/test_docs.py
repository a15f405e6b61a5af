"""README, documentation and studies: links lead somewhere, and the commands that are shown work."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import yaml
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from ptq161 import generate
from ptq161.cache import __main__ as cached
from ptq161.estimate import __main__ as estimate
from ptq161.replay import __main__ as replay
from ptq161.report import __main__ as report
from ptq161.run.command_line import check_arguments
from ptq161.run.config import load_run_config
from ptq161.search import __main__ as search
from ptq161.sweep.overrides import sweep_jobs
from ptq161.watch import __main__ as watch
from tests.end_to_end.test_studies import STUDIES

ROOT = Path(__file__).resolve().parents[1]
CONF = ROOT / "conf"
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "docs/**/*.md", "experiments/**/README.md", ".github/*.md", "examples/*.py")
    for path in ROOT.glob(pattern)
)
DOCUMENTS = [page for page in PAGES if page.endswith(".md")]

# Inline code is no link, though it may look like one.
CODE = re.compile(r"```.*?```|`[^`\n]*`", re.DOTALL)
LINK = re.compile(r"!?\[(?:[^\[\]]|\[[^\]]*\])*\]\(([^()\s]+)\)")
MAINS = {
    "estimate": estimate.main,
    "report": report.main,
    "search": search.main,
    "replay": replay.main,
    "watch": watch.main,
    "generate": generate.main,
    "cache": cached.main,
}
VERBS = tuple(MAINS)
PROGRAM = re.compile(
    r"(?:make run ARGS=|(?:[A-Z_0-9]+=\S+ )*(?:python run\.py|ptq161 (?:run|sweep|" + "|".join(VERBS) + ")"
    r"|python -m ptq161\.(?:" + "|".join(VERBS) + r"))(?:\s|$))"
)
# A command is shown in its general form where it has a placeholder in the place of a setting or of several. Names of
# files and folders (FILE, RUN_DIR, DATE) are values like any other: no file is opened here. A method called
# `name` or `sign` is the reader's own.
_GENERAL = (r"KEY=\S+", r"GROUP=\S+", r"\.\.\.", r"\[\S+=\S+\]", r"method=(?:name|sign)", r"\+study=NAME")
GENERAL = re.compile(rf"(?:^|\s)(?:{'|'.join(_GENERAL)})(?:\s|$)")


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


# links


def test_the_readme_is_no_manual() -> None:
    assert len(read("README.md").splitlines()) < 120


@pytest.mark.parametrize("page", DOCUMENTS)
def test_relative_links_lead_somewhere(page: str) -> None:
    for link in LINK.findall(CODE.sub(lambda code: "x" * len(code[0]), read(page))):
        path, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:", path):
            continue
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), f"{page}: {link}"
        if anchor:
            assert anchor in anchors(target), f"{page}: {link}"


@pytest.mark.parametrize("page", [page for page in DOCUMENTS if page.startswith(("docs/", "experiments/"))])
def test_pages_of_the_site_link_to_pages(page: str) -> None:
    """A folder has no page of its own on the site."""
    for link in LINK.findall(CODE.sub("", read(page))):
        target = ((ROOT / page).parent / link.partition("#")[0]).resolve()
        in_site = target.is_relative_to(ROOT / "docs") or target.is_relative_to(ROOT / "experiments")
        assert re.match(r"[a-z]+:", link) or not (in_site and target.is_dir()), f"{page}: {link}"


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and the site make them: a run of hyphens is one on the site."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    plain = [re.sub(r"[^\w\s-]", "", heading).strip().lower() for heading in headings]
    return {re.sub(pattern, "-", heading) for heading in plain for pattern in (r"\s", r"[\s-]+")}


def test_every_page_is_in_the_navigation() -> None:
    text = re.sub(r"!!python/\S+", "", read("mkdocs.yml"))
    listed = set(re.findall(r"[\w/.-]+\.md", str(yaml.safe_load(text)["nav"])))
    pages = {page.removeprefix("docs/") for page in DOCUMENTS if page.startswith(("docs/", "experiments/"))}
    assert pages <= listed
    assert listed - pages == {"CHANGELOG.md", "CONTRIBUTING.md"}


# commands


def commands(page: str) -> Iterator[str]:
    """The command lines of a page's code blocks and of its inline code, comments left out."""
    text = read(page)
    inline = [" ".join(code.split()) for code in re.findall(r"(?<!`)`([^`]+)`(?!`)", text)]
    lines = [line.strip() for line in re.sub(r"\\\n\s*", " ", text).splitlines() if line.startswith("    ")]
    for line in [*inline, *lines]:
        if PROGRAM.match(line):
            yield re.sub(r"\s+#.*| \(and .*", "", line)


def overrides(command: str) -> tuple[list[str], bool]:
    """What a command line of ``run.py``, ``ptq161 run`` or ``ptq161 sweep`` overrides, and whether it is a sweep."""
    words = [word for word in shlex.split(command) if not re.fullmatch(r"[A-Z_0-9]+=\S*", word)]
    if words[:2] == ["make", "run"]:
        words = shlex.split(shlex.split(command)[2].removeprefix("ARGS="))
        return words, False
    sweep = "sweep" in words[:2] or "-m" in words
    return [word for word in words[2:] if word != "-m" and not re.fullmatch(r"\[[^=]*\]", word)], sweep


RUNS = sorted(
    {
        command
        for page in PAGES
        for command in commands(page)
        if not GENERAL.search(command) and not re.search(rf"ptq161[ .](?:{'|'.join(VERBS)})\b", command)
    }
)
# tests/end_to_end/test_studies.py composes and checks every job of these.
WHOLE_STUDIES = {f"python run.py -m +study={name}" for name, study in STUDIES.items() if not study.overrides}
OF_VERBS = sorted(
    {
        (match[1], flag)
        for page in PAGES
        for command in commands(page)
        if (match := re.search(rf"ptq161[ .]({'|'.join(VERBS)})\b", command))
        for flag in re.findall(r"\s(--[a-z0-9-]+)", command)
    }
)


def test_commands_are_found() -> None:
    """What is skipped is not most of it."""
    shown = {command for page in PAGES for command in commands(page)}
    assert len(RUNS) > 60
    assert len([command for command in shown if GENERAL.search(command)]) < len(shown) / 5


@pytest.mark.parametrize("command", [command for command in RUNS if command not in WHOLE_STUDIES])
def test_a_command_composes(command: str) -> None:
    """Its configuration is valid; of a sweep, that of as many jobs as take every value of every setting."""
    words, sweep = overrides(command)
    words = [word for word in words if word not in ("--help",)]
    if sweep:  # as typed settings are changed before Hydra reads them
        words = check_arguments(["-m", *words])[1:]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        mode = RunMode.MULTIRUN if sweep else RunMode.RUN
        config = loader.load_configuration("config", words, run_mode=mode)
        if not sweep:
            load_run_config(task_config(config))
            return
        jobs = list(sweep_jobs(config, loader))
        assert jobs
        seen: set[str] = set()
        for job in jobs:
            if seen.issuperset(job):
                continue
            seen.update(job)
            load_run_config(task_config(loader.load_sweep_config(config, list(job))))


def task_config(config: DictConfig) -> DictConfig:
    return OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])


@cache
def help_of(verb: str) -> str:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), pytest.raises(SystemExit) as ended:
        MAINS[verb](["--help"])
    assert ended.value.code == 0
    return printed.getvalue()


@pytest.mark.parametrize(("verb", "flag"), OF_VERBS)
def test_a_flag_that_is_shown_exists(verb: str, flag: str) -> None:
    assert re.search(rf"{flag}\b", help_of(verb))


def test_pre_commit_has_the_linter_of_the_lock_file() -> None:
    (ruff,) = re.findall(r"^ruff==(\S+)$", read("requirements.lock"), re.MULTILINE)
    assert f"rev: v{ruff}\n" in read(".pre-commit-config.yaml")
