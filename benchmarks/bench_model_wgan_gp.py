import pytest
import suite


@pytest.mark.parametrize(("step", "variant"), suite.steps("wgan_gp"))
def test_wgan_gp_step(benchmark, step, variant):
    suite.run_step(benchmark, step, variant)
