"""Bad inputs, each with the sentence that it gets: command lines, files, models and calls of the library.

::

    python benchmarks/bad_inputs.py            # a table in Markdown, and a count
    python benchmarks/bad_inputs.py replay     # the inputs that have this word in them

Each input of ``bad_cases.py`` is tried in a process and a folder of its own. Its sentence has to match. Besides, there
is no traceback, the exit status is not 0, stderr has one sentence, nothing is written that looks finished (results or a
checkpoint), and the files that it was given are as they were. Where one of this is not so, stderr says what, and the
exit status is 1.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import warm
from bad_cases import CASES, Case
from bad_files import make_bad_inputs

INPUTS = "in"
"""The folder of the inputs, beside those in which the cases are tried."""
SECONDS = 120
"""After which an input hangs."""

_FRAME = re.compile(
    r"Error executing job with overrides|Set the environment variable HYDRA_FULL_ERROR|usage: |\s+\[|.*\d%\|"
)
"""Lines of stderr around a sentence: Hydra's, argparse's, progress bars."""


def main() -> int:
    """Try all inputs; return the exit status."""
    words = sys.argv[1:]
    cases = [case for case in CASES if all(word in case.text for word in words)]
    warm.prepare()
    wrong = 0
    print("| input | sentence |\n|---|---|")
    with tempfile.TemporaryDirectory(prefix="bad.") as place:
        inputs = Path(place) / INPUTS
        inputs.mkdir()
        arguments = warm.make_inputs(inputs)
        warm.call(lambda: make_bad_inputs(inputs, arguments), inputs)
        for i, case in enumerate(cases):
            folder = Path(place) / f"{i:03}"
            folder.mkdir()
            sentence, problems = _try(case, folder, inputs)
            print(
                f"| `{_cell(case.text)}` | {_cell(sentence.replace(place, '').replace(f'/{i:03}/', ''))} |", flush=True
            )
            for problem in problems:
                print(f"{case.text}: {problem}", file=sys.stderr, flush=True)
            wrong += bool(problems)
    print(f"\n{len(cases)} bad inputs, {wrong} of them without the right sentence.")
    return int(wrong > 0)


def _try(case: Case, folder: Path, inputs: Path) -> tuple[str, list[str]]:
    """Return the sentence that an input gets, and what is wrong with it or with what was left."""
    before = _files(inputs)
    process = warm.start(_work(case.text, inputs), folder, PTQ161_STORE=str(folder / "store"))
    process.wait(SECONDS)
    process.kill()
    errors = process.errors.read_text(encoding="utf-8", errors="replace")
    problems = list(_problems(case, process.status, errors))
    finished = [name for name in _files(folder) if name.endswith(("results.json", "config.json", ".safetensors"))]
    # What a run computes before it fails (tokens, scores of the full model) may stay in its store.
    problems += [f"{name} is left" for name in finished if not name.startswith("store/")]
    if _files(inputs) != before:
        changed = sorted(_files(inputs).items() ^ before.items())
        problems.append(f"the input {changed[0][0]} is not what it was")
    return " ".join(_sentences(errors)), problems


def _problems(case: Case, status: int | None, errors: str) -> Iterator[str]:
    sentences = _sentences(errors)
    if status is None or status <= 0:
        yield f"exit status {status}"
    if "Traceback" in errors:
        yield f"traceback: {errors.strip().splitlines()[-1]}"
    elif not 1 <= len(sentences) <= case.lines:
        yield f"{len(sentences)} lines on stderr: {sentences}"
    elif not re.search(case.sentence, " ".join(sentences)):
        yield f"{sentences} does not match {case.sentence!r}"


def _sentences(errors: str) -> list[str]:
    lines = [line.rpartition("\r")[2] for line in errors.splitlines()]
    return [line.strip() for line in lines if line.strip() and not _FRAME.match(line)]


def _work(text: str, inputs: Path) -> Callable[[], int]:
    if text.startswith("ptq161 "):
        words = shlex.split(text.replace(" TINY", " " + shlex.join(warm.tiny_arguments(inputs))))
        return warm.program(*words[1:])

    def work() -> int:
        from bad_cases import names_for_calls

        from ptq161.errors import UserError

        try:
            exec(text, names_for_calls(inputs))
        except UserError as error:
            print(error, file=sys.stderr)
            return 1
        except Exception:
            traceback.print_exc()
            return 1
        return 0

    return work


def _files(folder: Path) -> dict[str, tuple[int, int]]:
    """Return size and time of each file in a folder."""
    found = {}
    for place, _, files in os.walk(folder):
        for name in files:
            path = Path(place, name)
            found[path.relative_to(folder).as_posix()] = (path.lstat().st_size, path.lstat().st_mtime_ns)
    return found


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


if __name__ == "__main__":
    sys.exit(main())
