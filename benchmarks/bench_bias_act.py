import pytest
import suite


@pytest.mark.parametrize(("case", "mode", "name"), suite.parameters("bias_act"))
def test_bias_act(benchmark, case, mode, name):
    suite.run(benchmark, case, mode, name)
