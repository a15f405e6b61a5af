from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ptq161.errors import UserError
from ptq161.packed import quip
from ptq161.packed.quip import ROTATIONS, Butterfly, QuIPWeight, draw_rotations
from ptq161.packed.uniform import UNIFORM_BITS
from ptq161.packed.weight import packed_weight_from

both = pytest.mark.parametrize("rotation", sorted(ROTATIONS))


@settings(deadline=None, max_examples=40)
@given(n=st.integers(1, 200), rotation=st.sampled_from(sorted(ROTATIONS)), seed=st.integers(0, 2**63 - 1))
def test_rotations_are_orthogonal_and_undone(n: int, rotation: str, seed: int) -> None:
    drawn, _ = draw_rotations(rotation, seed, n, 1)
    matrix = drawn.apply(torch.eye(n)).T
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(n), atol=1e-5, rtol=0)
    x = torch.randn(3, n, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(drawn.apply(x), x @ matrix.T, atol=1e-5, rtol=0)
    torch.testing.assert_close(drawn.invert(drawn.apply(x)), x, atol=1e-5, rtol=0)


@both
@pytest.mark.parametrize("n", [576, 1536])
def test_rotations_spread_a_single_entry_over_all(rotation: str, n: int) -> None:
    drawn, _ = draw_rotations(rotation, 0, n, 1)
    spread = drawn.apply(torch.eye(n)[:8])
    assert ((spread.abs() > 1e-3 / n**0.5).float().mean() > 0.95) and spread.abs().max() < 14 / n**0.5


@both
def test_a_rotation_belongs_to_its_seed(rotation: str) -> None:
    x = torch.randn(4, 48)
    first, again, other = (draw_rotations(rotation, seed, 48, 96)[0].apply(x) for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)
    out_side, in_side = draw_rotations(rotation, 3, 48, 48)
    assert not torch.allclose(out_side.apply(x), in_side.apply(x))


@both
def test_drawing_leaves_the_global_generator_alone(rotation: str) -> None:
    before = torch.get_rng_state()
    draw_rotations(rotation, 1, 12, 20)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_rotation_stays_what_it_was() -> None:
    """A change of how rotations are drawn would make every stored checkpoint another model."""
    expected = {
        "butterfly": [7.967892, -5.695320, -12.880045],
        "hadamard": [-10.705685, -6.739833, 11.645073],
    }
    for rotation, values in expected.items():
        drawn, _ = draw_rotations(rotation, 12345, 12, 1)
        torch.testing.assert_close(drawn.apply(torch.arange(12.0))[:3], torch.tensor(values), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("n", "factors"), [(576, (24, 24)), (1536, (32, 48)), (192, (24, 8)), (11008, (688, 16)), (7, (7, 1))]
)
def test_butterfly_factors_are_those_of_the_released_code(n: int, factors: tuple[int, int]) -> None:
    drawn = Butterfly.draw(n, torch.Generator().manual_seed(0))
    p, q = factors
    assert drawn.first.shape == (q, p, p) and drawn.second.shape == (p, q, q)


@settings(deadline=None, max_examples=40)
@given(
    bits=st.sampled_from(UNIFORM_BITS),
    shape=st.tuples(st.integers(1, 12), st.integers(1, 40)),
    rotation=st.sampled_from(sorted(ROTATIONS)),
    rescaled=st.booleans(),
    scale_dtype=st.sampled_from(["float16", "float32"]),
    seed=st.integers(0, 2**62),
)
def test_round_trip(
    bits: int, shape: tuple[int, int], rotation: str, rescaled: bool, scale_dtype: str, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, shape, generator=generator)
    input_scales = torch.rand(shape[1], generator=generator).add(0.1).half().float() if rescaled else None
    packed = QuIPWeight.pack(
        codes,
        torch.tensor(0.75),
        bits,
        rotation=rotation,
        seed=seed,
        input_scales=input_scales,
        scale_dtype=scale_dtype,
    )
    out_side, in_side = (
        drawn.apply(torch.eye(n)).T for drawn, n in zip(draw_rotations(rotation, seed, *shape), shape, strict=True)
    )
    expected = out_side.T @ (0.75 * (2 * codes / (2**bits - 1) - 1)) @ in_side
    if input_scales is not None:
        expected = expected / input_scales
    values = packed.dequantize()
    assert values.shape == shape and values.dtype == torch.float32
    torch.testing.assert_close(values, expected, atol=2e-5, rtol=1e-4)
    again = packed_weight_from(packed.settings(), packed.state_dict())
    assert torch.equal(again.dequantize(), values) and again.nbytes == packed.nbytes


def test_everything_stored_is_counted() -> None:
    codes = torch.zeros(64, 96, dtype=torch.uint8)
    packed = QuIPWeight.pack(codes, torch.tensor(1.0), 2, rotation="hadamard", seed=1, input_scales=torch.ones(96))
    assert packed.nbytes == 64 * 96 // 4 + 2 * 96 + 2 + 8


@pytest.mark.parametrize("entry", ["codes", "scale", "input_scales", "seed"])
def test_a_flipped_bit_changes_the_output(entry: str) -> None:
    codes = torch.randint(0, 4, (8, 16))
    packed = QuIPWeight.pack(codes, torch.tensor(1.0), 2, rotation="butterfly", seed=9, input_scales=torch.ones(16))
    before = packed.dequantize()
    packed.state_dict()[entry].view(torch.uint8).flatten()[1] ^= 1
    assert not torch.equal(packed.dequantize(), before)


def test_a_scale_that_cannot_be_stored() -> None:
    with pytest.raises(UserError, match="float16"):
        QuIPWeight.pack(torch.zeros(2, 4, dtype=torch.uint8), torch.tensor(1e6), 2, rotation="hadamard", seed=0)


@both
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("shape", [(97, 576), (192, 1536), (7, 97)])
def test_few_rows_are_rotated_in_place_of_the_weight(shape: tuple[int, int], bits: int, rotation: str) -> None:
    torch.manual_seed(0)
    packed = random_weight(shape, bits, rotation).scaled(-2)
    weight, bias = packed.dequantize(), torch.randn(shape[0])
    for rows, dtype in [(1, torch.float32), (5, torch.bfloat16)]:
        x = torch.randn(rows, shape[1]).to(dtype)
        y = packed.rows_product(x, bias.to(dtype))
        assert y is not None and y.dtype == dtype
        expected = x.float() @ weight.T + bias.to(dtype).float()
        limit = 1e-5 if dtype == torch.float32 else 2**-8
        assert float((y.float() - expected).abs().max() / expected.abs().max()) < limit


def test_rotations_are_drawn_once_for_products(monkeypatch: pytest.MonkeyPatch) -> None:
    packed, x = random_weight((24, 48), 2, "butterfly"), torch.randn(2, 48)
    first = packed.rows_product(x, None)
    monkeypatch.setattr(quip, "draw_rotations", lambda *_: pytest.fail("drawn again"))
    again = packed.rows_product(x, None)
    assert first is not None and again is not None and torch.equal(first, again)


def test_products_that_are_left_to_the_dequantized_weight() -> None:
    x = torch.randn(2, 48)
    assert random_weight((24, 48), 8, "hadamard").rows_product(x, None) is None
    assert random_weight((24, 48), 2, "hadamard").rows_product(x, None, int8=True) is None


def random_weight(shape: tuple[int, int], bits: int, rotation: str) -> QuIPWeight:
    codes, input_scales = torch.randint(0, 2**bits, shape), torch.rand(shape[1]) + 0.5
    return QuIPWeight.pack(codes, torch.tensor(0.7), bits, rotation=rotation, seed=5, input_scales=input_scales)
