import pytest
from torch.nn.utils import parametrizations


@pytest.fixture
def nothing_iterated(monkeypatch):
    """For networks on the meta device: its tensors have no values that torch's spectral norm could iterate to."""
    monkeypatch.setattr(parametrizations._SpectralNorm, "_power_method", lambda *_: None)
