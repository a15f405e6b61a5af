"""The whole evaluation on local text, its record, the eval configs and the greedy sample."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf
from transformers import LlamaConfig

from ptq161.errors import UserError
from ptq161.evaluation import (
    EMBEDDED_TASKS,
    evaluate,
    greedy_sample,
    open_evaluation,
    open_tasks,
    perplexity,
    score_tasks,
)
from ptq161.evaluation.settings import EvalConfig
from ptq161.evaluation.zero_shot import sha256_of_documents, split_tasks
from ptq161.run.config import build

CONF = Path(__file__).resolve().parents[2] / "conf" / "eval"
NAMES = ["full", "paper", "ppl", "quick", "zero_shot"]


def load(name: str) -> EvalConfig:
    values = OmegaConf.to_container(OmegaConf.load(CONF / f"{name}.yaml"))
    return build(EvalConfig, values, "eval")


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog. " * 20)
    return path


def config(text_file, **settings):
    values = {"name": "test", "corpora": ["text_file"], "seq_len": 64, "tasks": [], "text_file": str(text_file)}
    return build(EvalConfig, values | settings, "eval")


def test_configs():
    assert sorted(path.stem for path in CONF.glob("*.yaml")) == NAMES
    assert all(load(name).name == name for name in NAMES)
    assert load("ppl").tasks == [] and load("zero_shot").corpora == []
    assert all(load(name).limit is load(name).max_windows is None for name in NAMES if name != "quick")
    assert set(load("quick").tasks) <= set(EMBEDDED_TASKS) == set(load("full").tasks)


def test_paper_uses_no_validation_split_of_its_own():
    paper = load("paper")
    assert (paper.corpora, paper.seq_len) == (["wikitext2", "c4"], 2048)
    assert paper.tasks == [
        "piqa",
        "arc_easy",
        "hellaswag",
        "winogrande",
        "race",
        "arc_challenge",
        "lambada_openai",
        "lambada_standard",
    ]


def test_scores_and_record(tiny_model, tiny_tokenizer, text_file):
    model = tiny_model("llama")
    opened = open_evaluation(
        tiny_tokenizer, config(text_file, max_windows=3, tasks=["copa", "lambada"], limit=5), model_max_length=512
    )
    emitted = {}
    scores = evaluate(
        model, tiny_tokenizer, opened, on_metric=lambda name, value, **where: emitted.update({name: value})
    )
    names = ["ppl/text_file@64", "zero_shot/copa/acc", "zero_shot/lambada/perplexity", "zero_shot/lambada/acc"]
    assert list(scores.metrics) == list(scores.protocol) == names
    assert emitted == scores.metrics
    tokens = torch.tensor(tiny_tokenizer(text_file.read_text())["input_ids"])
    assert scores.metrics[names[0]] == pytest.approx(perplexity(model, tokens, 64, max_windows=3).value, rel=1e-6)
    record = json.loads(json.dumps(scores.protocol))
    assert record[names[0]]["standard_error"] > 0
    del record[names[0]]["standard_error"], record[names[0]]["bos_rule"]
    assert record[names[0]] == {
        "seq_len": 64,
        "n_windows": 3,
        "n_tokens": 192,
        "corpus_tokens": 900,
        "split": "all",
        "source": "file text.txt",
        "joined_by": "",
        "n_documents": 1,
    }
    assert record["zero_shot/copa/acc"].pop("lm_eval").startswith("0.4.")
    assert record["zero_shot/copa/acc"].pop("standard_error") >= 0
    assert record["zero_shot/copa/acc"] == {
        "n_documents": 5,
        "limit": 5,
        "n_shot": 0,
        "split": "validation",
        "version": 1.0,
        "embedded": True,
    }
    assert evaluate(model, tiny_tokenizer, opened) == scores  # opened once, scored any number of times


def test_examples_do_not_depend_on_how_often_a_task_was_scored(tiny_model, tiny_tokenizer):
    opened = open_tasks(["copa"], limit=3)
    task = opened.loaded["tasks"]["copa"]
    task.set_config(key="num_fewshot", value=2)
    prompts = []
    for _ in range(2):
        score_tasks(tiny_model("llama"), tiny_tokenizer, opened)
        prompts.append([instance.args for instance in task.instances])
    assert prompts[0] == prompts[1]
    assert sha256_of_documents(opened) != sha256_of_documents(
        open_tasks(["copa"], limit=3)
    )  # examples are read as well


def test_progress_bars(tiny_model, tiny_tokenizer, text_file, capfd):
    opened = open_evaluation(tiny_tokenizer, config(text_file, tasks=["copa"], limit=3), 512)
    evaluate(tiny_model("llama"), tiny_tokenizer, opened)
    assert capfd.readouterr() == ("", "")
    evaluate(tiny_model("llama"), tiny_tokenizer, opened, label="full precision")
    out, err = capfd.readouterr()
    assert out == ""
    assert {line.split(":  ")[0].split(": 1")[0] for line in err.replace("\r", "\n").split("\n") if line} == {
        "full precision: perplexity on text_file",
        "full precision: zero-shot copa",
    }


def test_each_corpus_and_task_is_remembered_on_its_own(tiny_model, tiny_tokenizer, text_file):
    opened = open_evaluation(tiny_tokenizer, config(text_file, tasks=["copa", "lambada", "rte"], limit=3), 512)
    kept = {}

    def remember(measured, compute):
        key = json.dumps(measured, sort_keys=True)
        if key not in kept:
            if len(kept) == 3:
                raise KeyboardInterrupt  # killed in the last task
            kept[key] = json.loads(json.dumps(compute()))
        return kept[key]

    model = tiny_model("llama")
    with pytest.raises(KeyboardInterrupt):
        evaluate(model, tiny_tokenizer, opened, remember=remember)
    assert len(kept) == 3
    whole = evaluate(model, tiny_tokenizer, opened)
    computed = []

    def find(measured, compute):
        found = kept.get(json.dumps(measured, sort_keys=True))
        computed.extend([] if found else [measured["task"]])
        return found or compute()

    assert evaluate(model, tiny_tokenizer, opened, remember=find) == whole
    assert computed == ["rte"]
    # The rest of the protocol does not change a task's score.
    alone = open_evaluation(tiny_tokenizer, config(text_file, tasks=["rte"], limit=3, corpora=[]), 512)
    scores = evaluate(model, tiny_tokenizer, alone)
    assert scores.metrics == {"zero_shot/rte/acc": whole.metrics["zero_shot/rte/acc"]}


def test_what_is_remembered_depends_on_texts_and_settings(tiny_tokenizer, text_file, tmp_path):
    def keys(text=text_file, **settings):
        opened = open_evaluation(tiny_tokenizer, config(text, **({"tasks": ["copa"], "limit": 3} | settings)), 512)
        found = []

        def remember(measured, compute):
            found.append(json.dumps(measured, sort_keys=True))
            return {"metrics": {}, "protocol": {}}

        model = SimpleNamespace(config=LlamaConfig())  # nothing of it is run
        evaluate(model, tiny_tokenizer, opened, remember=remember)
        return found

    text, task = keys()
    copy = tmp_path / "copy" / text_file.name
    copy.parent.mkdir()
    copy.write_text(text_file.read_text())
    assert keys(copy) == [text, task]
    copy.write_text(text_file.read_text().replace("fox", "cat"))
    assert [old == new for old, new in zip([text, task], keys(copy), strict=True)] == [False, True]
    for settings, same in [
        ({"seq_len": 32}, [False, True]),
        ({"max_windows": 1}, [False, True]),
        ({"limit": 4}, [True, False]),
        ({"batch_size": 2}, [False, False]),
        ({"sample_tokens": 3}, [True, True]),
    ]:
        assert [old == new for old, new in zip([text, task], keys(**settings), strict=True)] == same, settings


def test_a_group_is_scored_with_its_tasks(tiny_model, tiny_tokenizer):
    from lm_eval.api.group import Group

    opened = open_tasks(["copa", "rte", "piqa"], limit=3)
    group = Group("pair")
    for name in ("copa", "rte"):
        group.add(opened.loaded["tasks"][name])
    grouped = dataclasses.replace(opened, loaded={"tasks": opened.loaded["tasks"], "groups": {"pair": group}})
    parts = list(split_tasks(grouped))
    assert [part.names for part in parts] == [("pair",), ("piqa",)]
    assert [set(part.loaded["tasks"]) for part in parts] == [{"copa", "rte"}, {"piqa"}]
    together = score_tasks(tiny_model("llama"), tiny_tokenizer, grouped)
    apart = {}
    for part in parts:
        apart |= score_tasks(tiny_model("llama"), tiny_tokenizer, part)
    assert apart == together
    assert len({sha256_of_documents(part) for part in [*parts, grouped]}) == 3


@pytest.mark.parametrize(
    ("settings", "max_length", "message"),
    [
        ({"seq_len": 901}, 2048, r"eval\.seq_len=901: corpus text_file has only 900 tokens"),
        ({"seq_len": 600}, 512, r"eval\.seq_len=600: the model takes at most 512 tokens"),
    ],
)
def test_refusals_before_any_work(settings, max_length, message, tiny_tokenizer, text_file):
    with pytest.raises(UserError, match=message):
        open_evaluation(tiny_tokenizer, config(text_file, **settings), max_length)


def test_greedy_sample(tiny_model, tiny_tokenizer):
    model = tiny_model("llama")
    own = model.generation_config
    sample = greedy_sample(model, tiny_tokenizer, "once upon", 5)
    inputs = tiny_tokenizer("once upon", return_tensors="pt")
    generated = model.generate(**inputs, do_sample=False, max_new_tokens=5, eos_token_id=1, pad_token_id=2)
    assert sample == tiny_tokenizer.decode(generated[0], skip_special_tokens=True)
    assert sample.startswith("once upon") and model.generation_config is own


def test_greedy_sample_ends_at_the_end_of_text(tiny_model, tiny_tokenizer):
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.weight[1] = torch.nn.functional.normalize(model.model.norm.weight, dim=0)
    logits = model(tiny_tokenizer("once", return_tensors="pt")["input_ids"]).logits[0, -1]
    if logits[1] < 0:
        model.lm_head.weight.data[1] *= -1
    assert greedy_sample(model, tiny_tokenizer, "once", 50) == "once"
