import pytest
import suite


@pytest.mark.parametrize(("case", "mode", "name"), suite.parameters("virtual_batch_norm"))
def test_virtual_batch_norm(benchmark, case, mode, name):
    suite.run(benchmark, case, mode, name)
