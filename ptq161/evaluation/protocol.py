"""A protocol of ``conf/eval``: every text and task is opened before a model is loaded, then scored in one call."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from importlib.metadata import version
from typing import Any, Protocol

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ptq161.data.corpora import Corpus, load_corpus
from ptq161.evaluation.checks import check_prompt, check_tokens
from ptq161.evaluation.denoising import DenoisingLoss, denoising_loss
from ptq161.evaluation.likelihood import Perplexity, check_windows, perplexity
from ptq161.evaluation.settings import EvalConfig
from ptq161.evaluation.zero_shot import (
    OpenTasks,
    ZeroShotScore,
    open_tasks,
    request_texts,
    score_tasks,
    sha256_of_documents,
    split_tasks,
)
from ptq161.files.hashing import sha256_of_tensors
from ptq161.methods.base import OnMetric, ignore_metric
from ptq161.models.architectures import diffusion_of

_DENOISING = ("denoising_loss", "denoising loss", denoising_loss)
# The logits of a batch have tokens x vocabulary elements: 4096 x 49152 in bfloat16 are 400 MB.
_PERPLEXITY_TOKENS_PER_BATCH = 4096


@dataclasses.dataclass(frozen=True)
class OpenEvaluation:
    """The texts and tasks of a protocol, loaded and checked.

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
        metrics: flat name, such as ``ppl/boolq@512``, ``denoising_loss/boolq@512`` or ``zero_shot/piqa/acc``, to value.
        protocol: the same names to the facts of the measurement: ``standard_error`` and, for a perplexity,
            ``seq_len``, ``n_windows``, ``n_tokens``, ``corpus_tokens``, ``split``, ``source``, ``bos_rule``,
            ``joined_by``, ``n_documents``, for a denoising loss ``mask_shares`` and ``mask_seed`` as well; for a task
            ``n_documents``, ``limit``, ``n_shot``, ``split``, ``version``, ``embedded``, ``lm_eval``.
    """

    metrics: Mapping[str, float]
    protocol: Mapping[str, Mapping[str, float | int | str | bool | None]]


class Remember(Protocol):
    """A cache of one model's scores."""

    def __call__(self, measured: Mapping[str, Any], compute: Callable[[], Mapping[str, Any]]) -> Mapping[str, Any]:
        """Return the stored scores of ``measured``, else those that ``compute`` returns.

        Args:
            measured: the text or task by content, with its settings; the key of the cache.
            compute: returns JSON values.
        """


def compute_always(measured: Mapping[str, Any], compute: Callable[[], Mapping[str, Any]]) -> Mapping[str, Any]:
    """Call ``compute``: the :class:`Remember` of a caller without a cache."""
    return compute()


def open_evaluation(
    tokenizer: PreTrainedTokenizerBase,
    config: EvalConfig,
    model_max_length: int | None,
    vocabulary: int | None = None,
) -> OpenEvaluation:
    """Load and check every corpus and task of a protocol.

    Args:
        tokenizer: the model's.
        config: the protocol.
        model_max_length: longest sequence of the model (``config.max_position_embeddings``); None if unbounded.
        vocabulary: rows of the model's embedding; None does not check the tokens.

    Raises:
        UserError: a corpus or task is unknown or cannot be fetched, or a corpus is shorter than one window;
            a text has tokens that the model does not know, or the prompt of the sample is too long.
    """
    check_prompt(tokenizer, config.sample_prompt, config.sample_tokens, model_max_length, vocabulary)
    corpora = []
    for name in dict.fromkeys(config.corpora):
        corpus = load_corpus(tokenizer, name, config.text_file)
        check_windows(len(corpus.tokens), config.seq_len, model_max_length, f"corpus {name}")
        if vocabulary is not None:
            check_tokens(tokenizer, corpus.tokens, vocabulary, f"eval.corpora={name}")
        corpora.append(corpus)
    tasks = open_tasks(config.tasks, config.limit)
    # Requests are built anew for each score. For the check alone only where the tokenizer has more tokens at all.
    if vocabulary is not None and len(tokenizer) > vocabulary:
        for name, text in request_texts(tasks):
            check_tokens(tokenizer, tokenizer(text)["input_ids"], vocabulary, f"eval.tasks={name}")
    return OpenEvaluation(config, tuple(corpora), tasks)


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    opened: OpenEvaluation,
    *,
    on_metric: OnMetric = ignore_metric,
    label: str | None = None,
    remember: Remember = compute_always,
) -> Scores:
    """Score a model on an opened protocol, which can be used for any number of models.

    Each corpus and each task is scored on its own, so that its scores do not depend on the rest of the protocol.

    Args:
        model: it runs on its own device, in its own dtype. Of a masked-diffusion model the denoising loss is measured
            in the place of the perplexity.
        tokenizer: its tokenizer, the one that opened the protocol.
        opened: what :func:`open_evaluation` returned.
        on_metric: receives every metric as soon as it is known.
        label: name of the model in the progress bars; None shows no bars.
        remember: cache of the model's scores, called for each corpus and each task.

    Raises:
        UserError: a loss or a score is not finite.
    """
    units = [_corpus_unit(model, corpus, opened.config, label) for corpus in opened.corpora]
    units += [_tasks_unit(model, tokenizer, tasks, opened.config, label) for tasks in split_tasks(opened.tasks)]
    metrics: dict[str, float] = {}
    protocol: dict[str, Mapping[str, float | int | str | bool | None]] = {}
    for measured, compute in units:
        found = remember(measured, compute)
        for name, value in found["metrics"].items():
            metrics[name], protocol[name] = value, found["protocol"][name]
            on_metric(name, value)
    return Scores(metrics, protocol)


_Unit = tuple[dict[str, Any], Callable[[], Mapping[str, Any]]]
"""A corpus or task by content, and the function that scores it: ``metrics`` and ``protocol`` by metric name."""


def _corpus_unit(model: PreTrainedModel, corpus: Corpus, config: EvalConfig, label: str | None) -> _Unit:
    settings: dict[str, Any] = {
        "max_windows": _least(config.max_windows, corpus.max_windows),
        "batch_size": max(1, min(config.batch_size, _PERPLEXITY_TOKENS_PER_BATCH // config.seq_len)),
    }
    is_causal = diffusion_of(model.config) is None
    metric, title, measure = ("ppl", "perplexity", perplexity) if is_causal else _DENOISING
    progress = label and f"{label}: {title} on {corpus.name}"
    name = f"{metric}/{corpus.name}@{config.seq_len}"

    def compute() -> dict[str, Any]:
        found = measure(model, corpus.tokens, config.seq_len, **settings, progress=progress)
        return {"metrics": {name: found.value}, "protocol": {name: _corpus_protocol(found, corpus)}}

    tokens = sha256_of_tensors({"tokens": corpus.tokens})
    return {"metric": name, "tokens": tokens, "corpus": _facts(corpus), **settings}, compute


def _tasks_unit(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tasks: OpenTasks, config: EvalConfig, label: str | None
) -> _Unit:
    (name,) = tasks.names

    def compute() -> dict[str, Any]:
        progress = label and f"{label}: zero-shot {name}"
        scores = score_tasks(model, tokenizer, tasks, batch_size=config.batch_size, progress=progress)
        return {
            "metrics": {name: score.value for name, score in scores.items()},
            "protocol": {name: _zero_shot_protocol(score) for name, score in scores.items()},
        }

    settings = {"limit": tasks.limit, "batch_size": config.batch_size}
    return {"task": name, "documents": sha256_of_documents(tasks), **settings}, compute


def _least(*bounds: int | None) -> int | None:
    return min((bound for bound in bounds if bound is not None), default=None)


def _corpus_protocol(found: Perplexity | DenoisingLoss, corpus: Corpus) -> dict[str, float | int | str | bool | None]:
    facts = dataclasses.asdict(found)
    facts.pop("value")
    return {**facts, "corpus_tokens": len(corpus.tokens), **_facts(corpus)}


def _facts(corpus: Corpus) -> dict[str, int | str]:
    return {key: getattr(corpus, key) for key in ("split", "source", "bos_rule", "joined_by", "n_documents")}


def _zero_shot_protocol(score: ZeroShotScore) -> dict[str, float | int | str | bool | None]:
    facts = dataclasses.asdict(score)
    facts.pop("value")
    return {**facts, "lm_eval": version("lm_eval")}
