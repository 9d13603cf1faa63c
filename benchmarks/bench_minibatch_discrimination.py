import pytest
import suite


@pytest.mark.parametrize(("case", "mode", "name"), suite.parameters("minibatch_discrimination"))
def test_minibatch_discrimination(benchmark, case, mode, name):
    suite.run(benchmark, case, mode, name)
