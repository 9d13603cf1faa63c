"""accelerate, compile, train, evaluate, another batch size, export, restore: in this order, in one fresh process."""

import subprocess
import sys
from pathlib import Path

import round_trip


def test_round_trip():
    script = Path(round_trip.__file__)
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert done.stdout.split("\n")[:-1] == list(round_trip.NETWORKS)
