import pytest
import suite


@pytest.mark.parametrize(("step", "variant"), suite.steps("sngan"))
def test_sngan_step(benchmark, step, variant):
    suite.run_step(benchmark, step, variant)
