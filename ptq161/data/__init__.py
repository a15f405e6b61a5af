"""Texts from embedded assets, the hub and files; calibration tokens and perplexity corpora.

They import nothing of this package but the ground floor, and every room from ``models`` up may import them.
"""

from ptq161.lazy import lazy_attributes

__getattr__ = lazy_attributes(
    __name__,
    {
        "ptq161.data.settings": ["CALIBRATION_SETS", "CORPORA", "CalibConfig"],
        "ptq161.data.calibration": ["calibration_tokens"],
        "ptq161.data.corpora": ["Corpus", "HUB_CORPORA", "load_corpus"],
        "ptq161.data.embedded": ["EMBEDDED", "passages"],
        "ptq161.data.text": ["bos_rule", "encode", "read_text"],
    },
)
