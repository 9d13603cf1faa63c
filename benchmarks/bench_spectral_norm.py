import pytest
import suite


@pytest.mark.parametrize(("case", "mode", "name"), suite.parameters("spectral_norm"))
def test_spectral_norm(benchmark, case, mode, name):
    suite.run(benchmark, case, mode, name)
