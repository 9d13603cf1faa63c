"""A network in evaluation mode for the time of a block."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """In evaluation mode within the block; after it, and after an error in it, each module is in the mode it was in.

    A part that was frozen in evaluation mode inside a network in training stays so.

    >>> network = nn.Sequential(nn.Dropout(), nn.Dropout().eval())
    >>> with evaluating(network):
    ...     assert not network[0].training
    >>> network.training, network[0].training, network[1].training
    (True, True, False)
    """
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        yield
    finally:
        # By train(), which a class may have a version of its own of; outer modules first, as it reaches all inner ones.
        for module, mode in modes:
            module.train(mode)
