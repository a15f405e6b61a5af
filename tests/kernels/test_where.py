import torch

from ptq161.kernels.where import fast_where


def test_a_choice_is_that_of_torch_where() -> None:
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(30, 1, generator=generator) > 0.5
    where, elsewhere = torch.randn(2, 30, 40, generator=generator) * 1e20
    assert torch.equal(fast_where(mask, where, elsewhere), torch.where(mask, where, elsewhere))
