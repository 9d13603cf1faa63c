import pytest
import suite


@pytest.mark.parametrize(("case", "mode", "name"), suite.parameters("interpolate_samples"))
def test_interpolate_samples(benchmark, case, mode, name):
    suite.run(benchmark, case, mode, name)
