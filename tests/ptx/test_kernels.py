"""The tests of Triton's and of CUDA C++ kernels once more, with what Triton and nvcc make of them: each launch runs in
the emulator (emulator.cpp), which looks for what compute-sanitizer looks for. A choice of cases, in processes of their
own, for kernels are decorated when they are imported; all of them:

    GANKERN_PTX=1 pytest tests/triton tests/cuda/test_kernels.py tests/ptx
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import emulator as ptx

HERE = Path(__file__).parent
TESTS = HERE.parent

# File -> which of its tests; of others all.
CHOSEN = {
    "test_unaligned.py": "float32 or stddev or pixel_norm",
    "test_every_primitive.py": "self_attention2d or float32 or bfloat16 and channels",
    "test_bias_act.py": "BLOCK or in_place",
    "test_gradient_penalty.py": "strides or special",
    "test_batch_norm_act.py": "woven or few_values or (strides or float32-True) and not 130 or prelu and 40 and sample",
    "test_group_norm_act.py": "40 and not 30 or bfloat16",
    "test_instance_norm_act.py": "strides or bfloat16",
    "test_minibatch_stddev.py": "float32 and strided or strides or bfloat16 and channels_last and contiguous",
    "test_minibatch_discrimination.py": "float32 or strides",
    "test_pixel_norm.py": "not float16",
    "test_spectral_norm.py": "not gradcheck and not far_from_one and not large and not float16",
    "test_virtual_batch_norm.py": "float32 or bfloat16 and channels_last or missing",
    "test_upfirdn2d.py": "strides or two_by_two and 4 or four_outputs",
    "test_launch.py": "every_variant and not down",
}
FILES = sorted({*(TESTS / "triton").glob("test_*.py"), *map(HERE.joinpath, ("test_faults.py", "test_unaligned.py"))})
FILES.remove(TESTS / "triton" / "test_aot.py")
PROCESSES = 4
CUDA = "batch_norm or minibatch and not float64 and not float16 or spectral or upfirdn2d"


def emulated(files, chosen):
    environment = {key: value for key, value in os.environ.items() if key not in ("TRITON_INTERPRET", "PYTEST_ADDOPTS")}
    environment |= {"GANKERN_PTX": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *files, "-k", chosen]
    ran = subprocess.run([*map(str, command)], env=environment, capture_output=True, text=True, cwd=TESTS.parent)
    assert ran.returncode == 0, ran.stdout[-8000:] + ran.stderr[-2000:]
    passed, launches = re.search(r"(\d+) passed", ran.stdout), re.search(r"(\d+) launches emulated", ran.stdout)
    assert passed and launches and int(launches[1]) >= int(passed[1]) > 0, ran.stdout[-2000:]


needs_compiler = pytest.mark.skipif(ptx.COMPILER is None, reason="needs a C++ compiler")


@needs_compiler
@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels themselves run here")
@pytest.mark.parametrize("part", range(PROCESSES))
def test_triton(part):
    pytest.importorskip("triton")
    files = FILES[part::PROCESSES]
    emulated(files, " or ".join(f"{f.name} and ({CHOSEN[f.name]})" if f.name in CHOSEN else f.name for f in files))


@needs_compiler
@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels themselves run here")
@pytest.mark.skipif(ptx.NVCC is None, reason="nvcc is not here")
def test_cuda():
    emulated([TESTS / "cuda" / "test_kernels.py"], CUDA)
