"""GPU kernels in Triton, one file a primitive. Importing this package needs Triton; nothing else does.

Every module holds the kernels, the functions that launch them on plain tensors (no autograd, no argument
checks: `gankern.ops` does both), and a list `AOT` of the compilations that `gankern.triton.aot` checks.
"""

import triton  # noqa: F401  (fail here, with Triton's own message, where it is not installed)
