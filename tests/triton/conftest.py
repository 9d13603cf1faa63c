"""Without Triton there is nothing to test here. How its kernels run is decided in tests/conftest.py."""

import importlib.util

if importlib.util.find_spec("triton") is None:
    collect_ignore_glob = ["test_*.py"]
