"""What a process may allocate."""

import subprocess
import sys

import pytest

PROGRAM = """
import torch
from gankern.measure import benchmark
from gankern.core import memory

assert memory.keep_freed_memory()
limit = memory.refuse_more_than_there_is()
assert limit > 2**28, limit
result = benchmark.Result("p", "case", "forward", "float32", "cpu", "")
makers = {
    "gankern": lambda: lambda: torch.ones(2),
    "small": lambda: lambda: torch.ones(3),
    "too large": lambda: lambda: torch.ones(limit // 4 + 2**20),
}
benchmark.contend(result, makers, 0.0)
print(result.peer, "|", result.contenders["too large"].failure)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's account of memory")
def test_a_peer_without_room_fails_alone():
    run = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    peer, failure = run.stdout.strip().split(" | ")
    assert peer == "small" and "allocate memory" in failure
