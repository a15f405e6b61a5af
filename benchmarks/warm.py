"""A warm fork server: runs of the program, and calls of the library, in processes that need not import anything.

``prepare`` imports the packages once; each process is then a fork of this one, which takes milliseconds. Used by
``kills.py`` and ``bad_inputs.py``.
"""

from __future__ import annotations

import atexit
import dataclasses
import importlib
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path

_QUIET = {
    # The fork of a process with threads has none of them, and the locks that they held stay locked.
    "OMP_NUM_THREADS": "1",
    "ARROW_DEFAULT_MEMORY_POOL": "system",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "MPLBACKEND": "agg",
}
_PRELOADED = (
    "ptq161.run.pipeline",
    "ptq161.run.session",
    "ptq161.sweep.app",
    "ptq161.sweep.callbacks",
    "ptq161.sweep.job",
    "ptq161.report.__main__",
    "ptq161.search.__main__",
    "ptq161.replay.__main__",
    "ptq161.watch.__main__",
    "ptq161.generate",
    "ptq161.cache.__main__",
)


def prepare() -> None:
    """Import what the processes need, once, with the environment that they have."""
    for name in [name for name in os.environ if name.startswith("WANDB_") or name == "HYDRA_FULL_ERROR"]:
        del os.environ[name]
    os.environ.update(_QUIET)
    for module in _PRELOADED:
        importlib.import_module(module)
    import torch
    from hydra import compose, initialize_config_dir
    from hydra.core.plugins import Plugins
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

    from ptq161.run.conf import CONF

    Plugins.instance()  # searches the installed packages
    with initialize_config_dir(str(CONF), version_base="1.3"):  # what its parser has seen, it parses faster
        compose("config", overrides=["calib.n_samples=4"])
    torch.set_num_threads(1)
    assert LlamaForCausalLM and PreTrainedTokenizerFast  # transformers imports both when they are named


@dataclasses.dataclass
class Process:
    """A started process.

    Attributes:
        pid: its number.
        output: the file that holds its stdout.
        errors: the file that holds its stderr.
        status: its exit status, negative for a signal; None while it runs.
    """

    pid: int
    output: Path
    errors: Path
    status: int | None = None

    def wait(self, seconds: float) -> int | None:
        """Wait until the process ends, for ``seconds`` at most; return its status."""
        until = time.monotonic() + seconds
        while self.status is None:
            pid, code = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.status = os.waitstatus_to_exitcode(code)
            elif time.monotonic() >= until:
                break
            else:
                time.sleep(min(0.002, max(0.0, until - time.monotonic())))
        return self.status

    def kill(self) -> None:
        """Kill the process where it stands, if it runs, and wait for the system to bury it."""
        if self.status is None:
            os.kill(self.pid, signal.SIGKILL)
            self.wait(60)


def program(*arguments: str) -> Callable[[], int]:
    """Return a work for :func:`start`: the program with these arguments, the first of which is a verb."""

    def work() -> int:
        from ptq161.__main__ import main

        return main(list(arguments))

    return work


def start(work: Callable[[], int], folder: Path, **environment: str) -> Process:
    """Start a work in a process of its own, which ends as that of ``python`` would: status, last words, exit functions.

    Whatever computes belongs into such a process, that of the inputs included: this one has to stay without threads.

    Args:
        work: returns the exit status.
        folder: the working directory; stdout and stderr are ``folder.out`` and ``folder.err`` beside it.
        environment: variables of the process.
    """
    assert threading.active_count() == 1, threading.enumerate()
    process = Process(0, folder.with_name(f"{folder.name}.out"), folder.with_name(f"{folder.name}.err"))
    sys.stdout.flush()
    sys.stderr.flush()
    process.pid = os.fork()
    if process.pid == 0:
        status = 70
        try:
            atexit._clear()  # the parent's own, such as the removal of its temporary folders
            _redirect(process)
            os.chdir(folder)
            os.environ.update(environment)
            status = _status_of(work)
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(status)
    return process


def call(function: Callable[[], None], folder: Path) -> None:
    """Call a function in a process of its own, and end the program if that fails."""

    def work() -> int:
        function()
        return 0

    process = start(work, folder)
    if process.wait(120) != 0:
        raise SystemExit(process.errors.read_text())


def _redirect(process: Process) -> None:
    for handle, path, flags in (
        (0, os.devnull, os.O_RDONLY),
        (1, process.output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
        (2, process.errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
    ):
        opened = os.open(path, flags, 0o644)
        os.dup2(opened, handle)
        os.close(opened)


def _status_of(work: Callable[[], int]) -> int:
    try:
        return work()
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    except BaseException:
        traceback.print_exc()
        return 1


# --- what is quantized ------------------------------------------------------------------------------------------------


def make_inputs(folder: Path) -> list[str]:
    """Make a tiny Llama, a tokenizer of bytes and a text; return the arguments of a run with them.

    Args:
        folder: exists; gets ``tiny/`` and ``tiny.txt``.
    """
    call(lambda: _make_inputs(folder), folder)
    return tiny_arguments(folder)


def _make_inputs(folder: Path) -> None:
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(
        vocab_size=256, num_hidden_layers=2, max_position_embeddings=512, initializer_range=0.1, pad_token_id=2, **sizes
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder / "tiny")
    # The bytes 0xFD to 0xFF never occur in UTF-8: leaving them out makes room for the special tokens.
    symbols = sorted(set(pre_tokenizers.ByteLevel.alphabet()) - {"\xfd", "\xfe", "\xff"})
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", *symbols])}
    bytes_of = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    bytes_of.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_of.decoder = decoders.ByteLevel()
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    PreTrainedTokenizerFast(tokenizer_object=bytes_of, model_max_length=512, **names).save_pretrained(folder / "tiny")
    (folder / "tiny.txt").write_text("".join(f"Line {i}: {i**2} squares and {i**3} cubes. " for i in range(200)))


def tiny_arguments(folder: Path) -> list[str]:
    """Return the arguments of a run on the inputs in a folder."""
    return [
        f"model.path={folder / 'tiny'}",
        "calib=text_file",
        f"calib.text_file={folder / 'tiny.txt'}",
        "calib.n_samples=4",
        "calib.seq_len=64",
        "eval=ppl",
        "eval.corpora=[text_file]",
        f"eval.text_file={folder / 'tiny.txt'}",
        "eval.seq_len=64",
        "eval.max_windows=8",
        "eval.sample_tokens=3",
        "device=cpu",
        "tracker=none",
    ]
