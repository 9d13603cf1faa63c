import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))


def pytest_collect_file(file_path, parent):
    """Benchmark files are called bench_*.py."""
    import pytest

    if file_path.name.startswith("bench_") and file_path.suffix == ".py":
        return pytest.Module.from_parent(parent, path=file_path)
