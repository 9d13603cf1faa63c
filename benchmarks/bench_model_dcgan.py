import pytest
import suite


@pytest.mark.parametrize(("step", "variant"), suite.steps("dcgan"))
def test_dcgan_step(benchmark, step, variant):
    suite.run_step(benchmark, step, variant)
