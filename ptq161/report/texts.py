"""Which text a run has seen, and which results may be ranked together: calibration text is part of a comparison."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from ptq161.data.settings import UNIONS

NO_TEXT, UNKNOWN, SAMPLED = "none", "unknown", "sampled from the model"
"""The text of what needs none, of what does not say it, as a stored checkpoint, and of ``finetune.text=self``."""
_TEXTS: Mapping[str, list[str]] = {
    "calib.name": [UNKNOWN],
    "preprocess.corpora": [],
    "finetune.corpora": [],
}
"""Keys that name a text, or a list of texts, from which a run learns -> the texts where the key is missing."""
TEXT_FREE = (
    "ptq161.methods.fp4.FP4",
    "ptq161.methods.fp8.FP8",
    "ptq161.methods.gse.GSE",
    "ptq161.methods.nf4.NF4",
    "ptq161.methods.rtn.RTN",
)
"""Methods that read no calibration text: their classes need neither statistics nor the full-precision chain.

They are named here, since importing a method takes torch, which the report does without."""


def text_seen(config: Mapping[str, Any], manifest: Mapping[str, Any]) -> str:
    """Return the text that a run's weights depend on, as a name to compare by: calibration and training are alike.

    Args:
        config: a run's configuration, flat: ``calib.n_samples`` -> 32.
        manifest: of the same run.

    Returns:
        the names of its texts, in alphabetical order. A file goes by the hash of its content, ``text_file 1a2b3c4d``,
        where the record has it, else by its name. ``NO_TEXT`` for full precision and for methods that read none.
    """
    if "method.name" not in config:
        return UNKNOWN
    if config["method.name"] == "none":
        return NO_TEXT
    names = set()
    for key, default in _TEXTS.items():
        group = key.partition(".")[0]
        if config.get(f"{group}.name") == "none":
            continue
        if group == "calib" and config.get("method._target_") in TEXT_FREE:
            continue
        if config.get(f"{group}.text") == "self":
            names.add(SAMPLED)
            continue
        texts = config.get(key) or default
        file = manifest.get("text_files", {}).get(group, "")[:8] or Path(str(config.get(f"{group}.text_file"))).name
        listed = [texts] if isinstance(texts, str) else texts
        if group in manifest.get("text_files", {}) and "text_file" not in listed:
            listed = ["text_file"]  # which adapters are trained on in the place of the corpora
        for name in [part for text in listed for part in UNIONS.get(text, (text,))]:
            names.add(f"text_file {file}" if name == "text_file" else str(name))
    return ", ".join(sorted(names)) or NO_TEXT


def comparisons(rows: pd.DataFrame) -> Iterator[tuple[str, str, pd.DataFrame]]:
    """Yield what is ranked together: the results of one model that have seen the same text, or need none.

    Args:
        rows: a row per result, with ``model`` and ``calibration_text``.

    Yields:
        the model, the text, and their rows. Results without a text are among the rows of each text.
    """
    for model, mine in rows.groupby("model", sort=False):
        for text in [text for text in mine.calibration_text.unique() if text != NO_TEXT] or [NO_TEXT]:
            yield str(model), text, mine[mine.calibration_text.isin([text, NO_TEXT])]


def remark(rows: pd.DataFrame) -> str:
    """Return the sentence that must stand beside a ranking of results with different texts; empty where all agree.

    Args:
        rows: of the quantized results.
    """
    texts = rows.calibration_text[rows.calibration_text != NO_TEXT]
    if len(texts) < 2 or (texts.nunique() == 1 and UNKNOWN not in texts.tolist()):
        return ""
    return (
        f"Not all results are known to have seen the same calibration text ({'; '.join(sorted(texts.unique()))}): each "
        "text has best values and a Pareto front of its own, among its results and those that need no text."
    )
