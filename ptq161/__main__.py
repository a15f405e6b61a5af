"""The command ``ptq161 VERB ...``; ``ptq161 VERB --help`` explains each.

``python run.py ...`` is ``ptq161 run ...``, and ``python -m ptq161.report ...`` is ``ptq161 report ...``.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from typing import NamedTuple

from ptq161.files.streams import never_fail_to_print
from ptq161.tracking.interrupts import exit_on_interrupt


class _Verb(NamedTuple):
    """A verb of the command line.

    Attributes:
        module: has ``main(arguments) -> exit status``.
        summary: what it does.
        first: arguments that go before the user's.
    """

    module: str
    summary: str
    first: tuple[str, ...] = ()


_VERBS = {
    "run": _Verb("ptq161.sweep.app", "quantize a model, score it, record the run: ptq161 run KEY=VALUE ..."),
    "sweep": _Verb("ptq161.sweep.app", "a run for each combination of values: ptq161 sweep KEY=A,B ...", ("-m",)),
    "estimate": _Verb("ptq161.estimate.__main__", "what a run will take: ptq161 estimate KEY=VALUE ..."),
    "watch": _Verb("ptq161.watch.__main__", "follow a sweep, or a run, in the terminal"),
    "report": _Verb("ptq161.report.__main__", "a page, tables and figures from recorded runs"),
    "search": _Verb("ptq161.search.__main__", "search settings for the Pareto front of two results"),
    "replay": _Verb("ptq161.replay.__main__", "run a recorded run again and compare every number"),
    "generate": _Verb("ptq161.generate", "text from a packed checkpoint, as it arises"),
    "cache": _Verb("ptq161.cache.__main__", "show what was computed before, or delete from it"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program.

    Args:
        arguments: a verb and its own arguments; None takes the process's.

    Returns:
        the exit status: that of the verb; 2 where there is no such verb, 1 where its packages are not installed.
    """
    never_fail_to_print()
    verb, *rest = (sys.argv[1:] if arguments is None else arguments) or [""]
    if verb in ("-h", "--help", "help"):
        print(_usage())
        return 0
    if verb not in _VERBS:
        print(f"{verb!r} is not a verb of ptq161.\n{_usage()}" if verb else _usage(), file=sys.stderr)
        return 2
    selected = _VERBS[verb]
    try:
        module = importlib.import_module(selected.module)
    except ModuleNotFoundError as error:
        if str(error.name).partition(".")[0] == "ptq161":
            raise
        print(f"ptq161 {verb} needs {error.name}, which is not installed: pip install 'ptq161[run]'.", file=sys.stderr)
        return 1
    sys.argv[0] = f"ptq161 {verb}"
    with exit_on_interrupt():
        status: int = module.main([*selected.first, *rest])
    return status


def _usage() -> str:
    verbs = "\n".join(f"  {name:<8} {verb.summary}" for name, verb in _VERBS.items())
    return f"Usage: ptq161 VERB [ARGUMENT ...]\n{verbs}\nptq161 VERB --help explains a verb."


if __name__ == "__main__":
    sys.exit(main())
