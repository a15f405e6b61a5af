"""The checksums of checkpoints and exports: every file but the card is listed, and a change of any is found."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import ptq161
from ptq161.errors import UserError
from ptq161.files.checksums import SUMS, check_sums
from tests.conftest import _tiny_model
from tests.damage import DAMAGES, Damage

TinyModel = Callable[..., PreTrainedModel]
TOKENS = torch.randint(3, 256, (2, 40), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    """A checkpoint. Copy it before changing it."""
    folder = tmp_path_factory.mktemp("stored") / "checkpoint"
    model = ptq161.quantize(_tiny_model("opt"), TOKENS, ptq161.PTQ161(epochs=0, batch_size=2))
    ptq161.save(model, tiny_tokenizer, folder)
    return folder


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name not in (SUMS, "README.md"))


def listed(folder: Path) -> list[str]:
    return [line.partition("  ")[2] for line in (folder / SUMS).read_text().splitlines()]


def test_checkpoints_and_exports_list_all_of_their_files(stored: Path, tmp_path: Path) -> None:
    dense = ptq161.export(stored, tmp_path / "dense")
    for folder in (stored, dense):
        assert listed(folder) == files(folder) and {"config.json", "tokenizer.json"} < set(files(folder))
        check_sums(folder)
    assert "packed.safetensors" in files(stored) and "model.safetensors" in files(dense)


def test_a_card_may_be_edited_and_a_file_added(stored: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(stored, tmp_path / "copy"))
    (folder / "README.md").write_text("mine")
    (folder / "notes.txt").write_text("mine")
    ptq161.load(folder)


def test_a_checkpoint_of_an_earlier_version_has_none(stored: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(stored, tmp_path / "copy"))
    (folder / SUMS).unlink()
    ptq161.load(folder)


def test_an_edit_that_is_meant(stored: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(stored, tmp_path / "copy"))
    config = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(config | {"eos_token_id": [1, 5]}))
    with pytest.raises(
        UserError, match=r"generation_config\.json has another SHA-256 .* or delete SHA256SUMS if the change"
    ):
        ptq161.load(folder)
    (folder / SUMS).unlink()
    assert ptq161.load(folder)[0].generation_config.eos_token_id == [1, 5]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_whatever_happens_to_a_file_is_found(
    stored: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = Path(shutil.copytree(stored, tmp_path_factory.mktemp("damaged") / "copy"))
    name = data.draw(st.sampled_from([*files(stored), SUMS]))
    damage: Damage = data.draw(DAMAGES)
    damage(folder / name, [folder / other for other in files(stored) if other != name])
    with pytest.raises(UserError) as caught:
        ptq161.load(folder)
    sentence = str(caught.value)
    assert "\n" not in sentence and sentence.endswith(".")
    assert name in sentence or SUMS in sentence


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_without_checksums_a_file_is_refused_or_read(
    stored: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """A checkpoint of an earlier version: what cannot be read is one sentence, whatever it holds."""
    folder = Path(shutil.copytree(stored, tmp_path_factory.mktemp("damaged") / "copy"))
    (folder / SUMS).unlink()
    name = data.draw(st.sampled_from(files(stored)))
    damage: Damage = data.draw(DAMAGES)
    damage(folder / name, [folder / other for other in files(stored) if other != name])
    try:
        ptq161.load(folder)
    except UserError as error:
        assert "\n" not in str(error) and str(error).endswith(".")
