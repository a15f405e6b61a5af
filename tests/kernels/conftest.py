from __future__ import annotations

from collections.abc import Iterator

import pytest

from ptq161.kernels import native


@pytest.fixture
def torch_alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Leave everything to torch's own operators."""
    with monkeypatch.context() as patch:
        patch.setattr(native, "usable", lambda *_: False)
        yield
