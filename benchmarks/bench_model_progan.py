import pytest
import suite


@pytest.mark.parametrize(("step", "variant"), suite.steps("progan"))
def test_progan_step(benchmark, step, variant):
    suite.run_step(benchmark, step, variant)
