"""What ``conf/eval`` asks for: every text and task opened before the model is touched, then scored in one call."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from importlib.metadata import version

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ptq161.config import EvalConfig
from ptq161.data import Corpus, load_corpus
from ptq161.evaluation.perplexity import Perplexity, check_windows, perplexity
from ptq161.evaluation.zero_shot import OpenTasks, ZeroShotScore, open_tasks, score_tasks
from ptq161.methods.base import OnMetric, ignore_metric

# The logits of a batch have tokens x vocabulary elements: 4096 x 49152 in bfloat16 are 400 MB.
PERPLEXITY_TOKENS_PER_BATCH = 4096


@dataclasses.dataclass(frozen=True)
class OpenEvaluation:
    """Everything that an evaluation reads, loaded and checked.

    Attributes:
        config: the protocol.
        corpora: perplexity texts, tokenized, each long enough for a window.
        tasks: zero-shot tasks with their documents.
    """

    config: EvalConfig
    corpora: tuple[Corpus, ...]
    tasks: OpenTasks


@dataclasses.dataclass(frozen=True)
class Scores:
    """The results of one model.

    Attributes:
        metrics: flat name, such as ``ppl/boolq@512`` or ``zero_shot/piqa/acc``, to value.
        protocol: the same names to what the value was taken over: ``standard_error`` and, for a perplexity,
            ``seq_len``, ``n_windows``, ``n_tokens``, ``corpus_tokens``, ``split``, ``source``, ``bos_rule``,
            ``joined_by``, ``n_documents``; for a task ``n_documents``, ``limit``, ``n_shot``, ``split``,
            ``version``, ``embedded``, ``lm_eval``.
    """

    metrics: Mapping[str, float]
    protocol: Mapping[str, Mapping[str, float | int | str | bool | None]]


def open_evaluation(
    tokenizer: PreTrainedTokenizerBase, config: EvalConfig, model_max_length: int | None
) -> OpenEvaluation:
    """Load and check every corpus and task of a protocol.

    Args:
        tokenizer: the model's.
        config: the protocol.
        model_max_length: positions that the model can hold (``config.max_position_embeddings``), None if unbounded.

    Raises:
        UserError: a corpus or task cannot be had, is unknown, or is too short for one window.
    """
    corpora = []
    for name in dict.fromkeys(config.corpora):
        corpus = load_corpus(tokenizer, name, config.text_file)
        check_windows(len(corpus.tokens), config.seq_len, model_max_length, f"corpus {name}")
        corpora.append(corpus)
    return OpenEvaluation(config, tuple(corpora), open_tasks(config.tasks, config.limit))


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    opened: OpenEvaluation,
    *,
    on_metric: OnMetric = ignore_metric,
    label: str | None = None,
) -> Scores:
    """Score a model on everything that was opened; the same opened protocol serves any number of models.

    Args:
        model: a causal language model; it runs on its own device, in its own dtype.
        tokenizer: its tokenizer, the one that opened the protocol.
        opened: what :func:`open_evaluation` returned.
        on_metric: hears every metric as soon as it is known.
        label: what the progress bars call the model; None shows no bars.

    Raises:
        UserError: a loss or a score is not finite.
    """
    config = opened.config
    metrics: dict[str, float] = {}
    protocol: dict[str, Mapping[str, float | int | str | bool | None]] = {}
    for corpus in opened.corpora:
        found = perplexity(
            model,
            corpus.tokens,
            config.seq_len,
            max_windows=_least(config.max_windows, corpus.max_windows),
            batch_size=max(1, min(config.batch_size, PERPLEXITY_TOKENS_PER_BATCH // config.seq_len)),
            progress=label and f"{label}: perplexity on {corpus.name}",
        )
        name = f"ppl/{corpus.name}@{config.seq_len}"
        metrics[name], protocol[name] = found.value, _perplexity_protocol(found, corpus)
        on_metric(name, found.value)
    scores = score_tasks(
        model, tokenizer, opened.tasks, batch_size=config.batch_size, progress=label and f"{label}: zero-shot"
    )
    for name, score in scores.items():
        metrics[name], protocol[name] = score.value, _zero_shot_protocol(score)
        on_metric(name, score.value)
    return Scores(metrics, protocol)


def _least(*bounds: int | None) -> int | None:
    return min((bound for bound in bounds if bound is not None), default=None)


def _perplexity_protocol(found: Perplexity, corpus: Corpus) -> dict[str, float | int | str | bool | None]:
    facts = dataclasses.asdict(found)
    facts.pop("value")
    about = {key: getattr(corpus, key) for key in ("split", "source", "bos_rule", "joined_by", "n_documents")}
    return {**facts, "corpus_tokens": len(corpus.tokens), **about}


def _zero_shot_protocol(score: ZeroShotScore) -> dict[str, float | int | str | bool | None]:
    facts = dataclasses.asdict(score)
    facts.pop("value")
    return {**facts, "lm_eval": version("lm_eval")}
