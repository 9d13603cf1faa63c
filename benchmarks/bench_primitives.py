"""Every primitive's cases, by pytest-benchmark; -k pixel_norm takes one primitive's."""

import pytest
import suite


@pytest.mark.parametrize(("case", "mode", "name"), suite.parameters())
def test_primitive(benchmark, case, mode, name):
    suite.run(benchmark, case, mode, name)
