"""The convolutions against their peers: pytest benchmarks/bench_convolution.py"""

import pytest
import suite


@pytest.mark.parametrize(("case", "mode", "name"), suite.parameters("convolution"))
def test_convolution(benchmark, case, mode, name):
    suite.run(benchmark, case, mode, name)
