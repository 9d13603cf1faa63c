import pytest
import suite


@pytest.mark.parametrize(("case", "mode", "name"), suite.parameters("upfirdn2d"))
def test_upfirdn2d(benchmark, case, mode, name):
    suite.run(benchmark, case, mode, name)
