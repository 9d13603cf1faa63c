"""No allocation unchecked: where there is no memory for an operator's scratch, it raises MemoryError, and goes on after."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gankern.core.native import NATIVE_MISSING

# The kernels' scratch is all from aligned_alloc, which torch does not use: the one here can fail when told to.
FAILING = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stddef.h>
static int left = -1;
void fail_after(int calls) { __atomic_store_n(&left, calls, __ATOMIC_SEQ_CST); }
void* aligned_alloc(size_t alignment, size_t size) {
  void* (*real)(size_t, size_t) = (void* (*)(size_t, size_t))dlsym(RTLD_NEXT, "aligned_alloc");
  if (__atomic_load_n(&left, __ATOMIC_SEQ_CST) >= 0 && __atomic_fetch_sub(&left, 1, __ATOMIC_SEQ_CST) == 0) return NULL;
  return real(alignment, size);
}
"""

PROGRAM = """
import ctypes, json, sys
sys.path.insert(0, sys.argv[2])
import torch, operators
import gankern.functional as GF

library = ctypes.CDLL(sys.argv[1])
failures = {}

def fails(name, call):
    # The first allocation fails, then the second, until none does.
    for calls in range(1000):
        library.fail_after(calls)
        try:
            call()
        except MemoryError as error:
            assert "gankern: no memory for " in str(error), str(error)
            failures[name] = failures.get(name, 0) + 1
        else:
            break
        finally:
            library.fail_after(-1)
    call()

for operator, args in operators.recorded(torch.float32):
    fails(operator._schema.name.partition("::")[2], lambda: operators.run(operator, args))
torch.set_num_threads(2)
x, taps = torch.randn(8, 16, 64, 64), torch.ones(4)
fails("upfirdn2d on threads", lambda: GF.upfirdn2d(x, taps, up=2, implementation="cpu"))

# A backward, of each order: the engine runs it.
def twice(function, *tensors):
    def call():
        found = torch.autograd.grad(function(*tensors).square().sum(), tensors, create_graph=True)
        torch.autograd.grad(sum(g.square().sum() for g in found), tensors)
    return call

x, weight, c = torch.randn(4, 16, 8, 8), torch.randn(16, 16, 3, 3), torch.ones(16)
for t in (x, weight, c):
    t.requires_grad_()
fails("backward of minibatch_stddev", twice(lambda x: GF.minibatch_stddev(x, implementation=None), x))
fails("backward of batch_norm_act", twice(lambda x, c: GF.batch_norm_act(x, None, None, c, c, True), x, c))
fails("backward of conv2d", twice(lambda x, w: GF.conv2d(x, w, padding=1), x, weight))
fails("backward of pixel_norm", twice(lambda x: GF.pixel_norm(x), x))
print(json.dumps(failures))
"""


@pytest.mark.skipif(NATIVE_MISSING is not None or sys.platform != "linux", reason="needs the native library, on Linux")
def test_out_of_memory_is_an_error(tmp_path):
    compiler = next(filter(shutil.which, ("cc", "gcc", "clang")), None)
    if compiler is None:
        pytest.skip("no C compiler")
    source, library = tmp_path / "failing.c", tmp_path / "libfailing.so"
    source.write_text(FAILING)
    subprocess.run([compiler, "-shared", "-fPIC", str(source), "-o", str(library), "-ldl"], check=True)
    command = [sys.executable, "-c", PROGRAM, str(library), str(Path(__file__).parent)]
    result = subprocess.run(
        command, env={**os.environ, "LD_PRELOAD": str(library)}, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    failures = json.loads(result.stdout.splitlines()[-1])
    for name in (
        "backward of minibatch_stddev",
        "backward of batch_norm_act",
        "batch_norm_act",
        "bias_act_double_backward",
        "convolution_row",
        "minibatch_discrimination",
        "minibatch_stddev",
        "pixel_norm",
        "spectral_norm",
        "spectral_norm_backward",
        "upfirdn2d",
        "upfirdn2d on threads",
        "virtual_batch_norm",
    ):
        assert failures.get(name), (name, failures)
