"""Whole training steps of every model, by pytest-benchmark; -k dcgan takes one model's."""

import pytest
import suite


@pytest.mark.parametrize(("step", "variant"), suite.steps())
def test_model_step(benchmark, step, variant):
    suite.run_step(benchmark, step, variant)
