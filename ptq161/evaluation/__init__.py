"""Scores of a model: perplexity, zero-shot tasks through lm-eval, and a greedy text sample.

It imports ``methods`` (the type of its callback), ``data``, ``files`` and the ground floor; ``tracking`` and every room
above may import it, ``preprocess`` may not. Importing this package imports lm-eval.
"""

from ptq161.evaluation.embedded import EMBEDDED_TASKS
from ptq161.evaluation.perplexity import Perplexity, perplexity
from ptq161.evaluation.protocol import OpenEvaluation, Remember, Scores, compute_always, evaluate, open_evaluation
from ptq161.evaluation.sample import greedy_sample
from ptq161.evaluation.zero_shot import OpenTasks, ZeroShotScore, open_tasks, score_tasks

__all__ = [
    "EMBEDDED_TASKS",
    "OpenEvaluation",
    "OpenTasks",
    "Perplexity",
    "Remember",
    "Scores",
    "ZeroShotScore",
    "compute_always",
    "evaluate",
    "greedy_sample",
    "open_evaluation",
    "open_tasks",
    "perplexity",
    "score_tasks",
]
