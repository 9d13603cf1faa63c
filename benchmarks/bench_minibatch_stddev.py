import pytest
import suite


@pytest.mark.parametrize(("case", "mode", "name"), suite.parameters("minibatch_stddev"))
def test_minibatch_stddev(benchmark, case, mode, name):
    suite.run(benchmark, case, mode, name)
