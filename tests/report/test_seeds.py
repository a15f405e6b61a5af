"""Which runs are the same but for their seed, and what their scores say together."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import bootstrap

from ptq161.report.seeds import estimate, identity_without_seed

CONFIG = {
    "model.name": "tiny",
    "model.path": "a/model",
    "method.name": "rtn",
    "method.bits": 2,
    "calib.name": "squad",
    "seed": 0,
    "mask_ratio": 0.2,
    "tracker.name": "wandb",
    "dtype": "auto",
}
MANIFEST = {"sources_sha256": "s", "versions": {"torch": "2", "numpy": "2"}, "dtype": "bfloat16"}


def test_one_value_stands_alone() -> None:
    found = estimate([3.0], 0.5)
    assert (found.value, found.standard_error) == (3.0, 0.5) and math.isnan(found.low) and math.isnan(found.high)


def test_the_interval_is_the_percentile_bootstrap_of_the_mean() -> None:
    values = np.random.default_rng(1).lognormal(size=12)
    found = estimate(values.tolist(), 0.5)
    theirs = bootstrap((values,), np.mean, method="percentile", rng=np.random.default_rng(5)).confidence_interval
    assert found.value == pytest.approx(values.mean())
    assert (found.low, found.high) == pytest.approx((theirs.low, theirs.high), rel=0.02)
    assert math.isnan(found.standard_error)
    again = estimate(values.tolist())  # the generator is seeded
    assert (again.value, again.low, again.high) == (found.value, found.low, found.high)


@given(st.lists(st.floats(0.01, 1e6), min_size=2, max_size=6))
def test_the_interval_holds_the_mean_and_lies_within_the_values(values: list[float]) -> None:
    found = estimate(values)
    slack = 1e-9 * max(values)
    assert min(values) - slack <= found.low <= found.value + slack
    assert found.value - slack <= found.high <= max(values) + slack


def test_values_that_are_not_finite_have_no_interval() -> None:
    found = estimate([1.0, math.inf])
    assert found.value == math.inf and math.isnan(found.low) and math.isnan(found.high)
    assert math.isnan(estimate([1.0, math.nan]).value)


@pytest.mark.parametrize("key", ["seed", "mask_ratio", "tracker.name", "hydra.run.dir", "force"])
def test_what_changes_no_result_is_not_in_the_identity(key: str) -> None:
    assert identity_without_seed({**CONFIG, key: "other"}, MANIFEST) == identity_without_seed(CONFIG, MANIFEST)


@pytest.mark.parametrize("key", ["method.bits", "method.name", "calib.name", "model.name", "model.path", "eval.limit"])
def test_every_setting_of_a_group_is(key: str) -> None:
    assert identity_without_seed({**CONFIG, key: "other"}, MANIFEST) != identity_without_seed(CONFIG, MANIFEST)


@pytest.mark.parametrize("fact", ["sources_sha256", "dtype", "model_sha256"])
def test_so_are_sources_dtype_and_weights(fact: str) -> None:
    assert identity_without_seed(CONFIG, {**MANIFEST, fact: "other"}) != identity_without_seed(CONFIG, MANIFEST)
    newer = {**MANIFEST, "versions": {"torch": "3", "numpy": "2"}}
    assert identity_without_seed(CONFIG, newer) != identity_without_seed(CONFIG, MANIFEST)


def test_a_manifest_that_knows_the_identity_is_believed() -> None:
    known = {**MANIFEST, "identity_without_seed": "0123"}
    assert identity_without_seed(CONFIG, known) == "0123"
    assert identity_without_seed({**CONFIG, "method.bits": 3}, known) == "0123"


def test_weights_go_by_their_content_wherever_they_lie() -> None:
    known = {**MANIFEST, "model_sha256": "m"}
    moved = {**CONFIG, "model.path": "b/model"}
    assert identity_without_seed(moved, known) == identity_without_seed(CONFIG, known)


def test_stored_checkpoints_are_told_apart_by_their_content() -> None:
    stored = {key: value for key, value in CONFIG.items() if not key.startswith("method")}
    first, second = ({**MANIFEST, "checkpoint_sha256": digest} for digest in "ab")
    assert identity_without_seed(stored, first) != identity_without_seed(stored, second)
    assert identity_without_seed(CONFIG, first) == identity_without_seed(CONFIG, second)
