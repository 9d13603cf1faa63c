import pytest
import suite


@pytest.mark.parametrize(("case", "mode", "name"), suite.parameters("pixel_norm"))
def test_pixel_norm(benchmark, case, mode, name):
    suite.run(benchmark, case, mode, name)
