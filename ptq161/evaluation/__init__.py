"""Scores of a model: perplexity, zero-shot tasks through lm-eval, and a greedy text sample.

It imports ``methods`` (the type of its callback), ``data``, ``files`` and the ground floor; ``tracking`` and every room
above may import it, ``preprocess`` may not.
"""

from ptq161.lazy import lazy_attributes

__getattr__ = lazy_attributes(
    __name__,
    {
        "ptq161.evaluation.denoising": ["DenoisingLoss", "denoised_sample", "denoising_loss"],
        "ptq161.evaluation.embedded": ["EMBEDDED_TASKS"],
        "ptq161.evaluation.likelihood": ["Perplexity", "perplexity"],
        "ptq161.evaluation.protocol": [
            "OpenEvaluation",
            "Remember",
            "Scores",
            "compute_always",
            "evaluate",
            "open_evaluation",
        ],
        "ptq161.evaluation.sample": ["greedy_sample"],
        "ptq161.evaluation.zero_shot": ["OpenTasks", "ZeroShotScore", "open_tasks", "score_tasks"],
    },
)
