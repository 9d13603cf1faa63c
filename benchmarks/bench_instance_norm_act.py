import pytest
import suite


@pytest.mark.parametrize(("case", "mode", "name"), suite.parameters("instance_norm_act"))
def test_instance_norm_act(benchmark, case, mode, name):
    suite.run(benchmark, case, mode, name)
