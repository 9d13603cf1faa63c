"""GPU kernels in Triton, one file a primitive. Importing this package needs Triton; nothing else does.

Every module holds the kernels, the functions that launch them on plain tensors (no autograd, no argument
checks: `gankern.ops` does both), and a function `examples` that calls these, for the check of `gankern.triton.aot`.
`gankern.triton.launch` is how every kernel is launched.
"""

import triton  # noqa: F401  (fail here, with Triton's own message, where it is not installed)
