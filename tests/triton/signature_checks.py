"""Checks of what is read of many tensors at once, which test_launch.py runs as those of launch_checks.py."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import stub_driver

from gankern.core import native
from gankern.triton import launch


def signatures_tell_apart_what_calls_differ_in():
    """Of each two lists of arguments: C++ has one key for both where Python has. And what C++ leaves to Python."""
    x = torch.zeros(4, 6, 8)
    room = torch.zeros(4 * 6 * 8 + 8)
    tensors = [
        x,
        torch.zeros(4, 6, 8),
        x.double(),
        x.half(),
        x.int(),
        x.view(torch.int32),
        x.transpose(1, 2).contiguous().transpose(1, 2),
        x[:, :, ::2],
        x[..., :4],
        x.expand(2, 4, 6, 8),
        x.flatten(),
        x.reshape(4, 48),
        x.reshape(24, 8),
        *(room[offset : offset + 192].view(4, 6, 8) for offset in range(1, 6)),
        x[:0],
        x.sum(),
        torch.zeros(1),
        torch.zeros(4, 6, 8, device="meta"),
    ]
    numbers = [0, 1, -1, 2, 2**31, 2**62, -(2**63), True, False, 0.0, -0.0, 1.0, 1.5, float("nan"), float("inf"), None]
    texts = ["", "a", "b", "backward", "backwards", "forward", "a long text of more than one word", "\0", "\0\0"]
    lists = [[], (), [None], (None,), [x], (x,), [x, x], [x, None], [None, x], [0, 1], (0, 1), [1], ["a"], [0.0, -0.0]]
    calls = [(entry,) for entry in (*tensors, *numbers, *texts, *lists)]
    calls += [(), (x, x), (x, None), ([x], x), ([x, x],), ([], [x]), ([x], []), ((x,), 1), ("a", "b"), ("ab",), (0, 1)]
    readers = {}
    keys = [(native.nodes.signature(call, False), launch._read(readers, call)) for call in calls]
    again = [(native.nodes.signature(call, False), launch._read(readers, call)) for call in calls]
    assert not any(known is NotImplemented for known, _ in keys)
    for one, known, by_python in zip(calls, *zip(*keys)):
        for other, other_known, other_by_python in zip(calls, *zip(*again)):
            same = by_python == other_by_python
            assert (known == other_known) == same and (known != other_known) == (not same), (one, other)
            assert not same or hash(known) == hash(other_known)
    assert keys[0][0] != keys[0][1] and keys[0][0] != 3
    # A parameter is a tensor, as kernels see it.
    assert native.nodes.signature((torch.nn.Parameter(x),), False) == native.nodes.signature((x,), False)
    large = torch.empty(2**31, dtype=torch.int8).view(torch.float32)[:64]
    small = torch.empty(64)
    for by_memory in (False, True):
        one, other = (native.nodes.signature((t,), by_memory) for t in (large, small))
        assert (one != other) == by_memory

    class Number(int):
        pass

    class Other(torch.Tensor):
        pass

    batched = []
    torch.vmap(lambda row: batched.append(native.nodes.signature((row,), False)) or row)(x)
    left = [2**63, Number(3), x.as_subclass(Other), x.to_sparse(), torch.float32, x.device, {}, {1}, [[[1]]], "\ud800"]
    assert batched == [NotImplemented]
    for argument in left:
        for call in ((argument,), ([x, argument],)):
            assert native.nodes.signature(call, False) is NotImplemented, call
    for wrong in ([x], x, None):
        assert native.nodes.signature(wrong, False) is NotImplemented


def addresses_are_those_of_the_tensors():
    """Some bytes behind the first element of each, 0 for None, by C++ as by Python, which a subclass has."""

    class Other(torch.Tensor):
        pass

    x, y = torch.zeros(64), torch.zeros(64, dtype=torch.float64)[3:]
    for one in (x, x.as_subclass(Other)):
        places = [(one, 0), None, (y, 16), (one, -8), None]
        right = (x.data_ptr(), 0, y.data_ptr() + 16, x.data_ptr() - 8, 0)
        tensors, addresses = launch._addresses_of(places)
        found = addresses(tensors)
        assert tuple(found) == right and len(found) == 5 and found == addresses(tensors)
        assert hash(found) == hash(addresses(tensors))
        assert found != addresses((one, None, one, one, None))


def groups_follow_their_tensors():
    """Spectral norm of a group whose weights are exchanged, moved, laid out otherwise, made of another type, or given
    twice: the launches of a plan are those of the launcher without one, and each table has the addresses of its call."""
    from gankern.triton import spectral_norm as sn

    driver, _ = stub_driver.start_uncompiled()
    weights = [torch.empty(16, 8, 3, 3) for _ in range(3)]
    us, vs, state = [torch.empty(16)] * 3, [torch.empty(72)] * 3, torch.empty(3 + 3 * 88)
    dims, tables = [0] * 3, []
    upload, lookup = sn.PointerTables.upload, sn.PointerTables.__call__

    def looked_up(self, addresses):
        table = lookup(self, addresses)
        assert torch.equal(table, upload(self, addresses, torch.empty_like(table)))
        tables.append([place[1:] for place in table.view(3, -1).tolist()])
        return table

    sn.PointerTables.__call__ = looked_up

    def done():
        found = []
        for launcher, given in (
            (sn.forward, (weights, us, vs, dims, 1, 1e-12, True, False)),
            (sn.backward, (grads, weights, state, dims)),
            (sn.double_backward, (grads, grads, weights, state, dims)),
        ):
            driver.launches.clear()
            tables.clear()
            results = torch.utils._pytree.tree_leaves(launcher(*given))
            (table,) = tables
            for row, weight, grad in zip(table, weights, grads):
                if launcher is sn.forward or grad is not None:
                    assert row[0] == weight.data_ptr()
            new = {r.data_ptr() for r in results if r.numel()}
            places = [[0 if address in new else address for address in row] for row in table]
            if launcher is sn.forward:  # new u and new v lie in the state
                places = [row[:4] for row in places]
            kernels = [(grid, kernel) for grid, _, kernel, _ in driver.launches]
            facts = [(r.shape, r.stride(), r.dtype) for r in results]
            found.append((kernels, facts, places))
        return found

    def check():
        with launch._unplanned():
            right = done()
        for _ in range(3):
            assert done() == right

    for step in range(8):
        if step == 1:
            weights[0], weights[1] = weights[1], weights[0]
        if step == 2:
            weights[2].data = torch.empty(16, 8, 3, 3)
        if step == 3:
            weights[1].data = weights[1].data.contiguous(memory_format=torch.channels_last)
        if step == 4:
            weights[0] = weights[2]
        if step == 5:
            weights[1] = torch.empty(16 * 72 + 1)[1:].view(16, 8, 3, 3)
        if step == 6:
            weights[:] = [weight.double() for weight in weights]
            us, vs, state = [us[0].double()] * 3, [vs[0].double()] * 3, state.double()
        grads = list(weights)
        if step == 7:
            grads[1] = None
        check()


def layers_cost_little():
    """A group of 11 layers, whose three kernels are launched with what they are given, calls less than two of the JIT's
    launches do. Counted: a time would be the machine's."""
    jit = stub_driver.host_cost(stub_driver.calls_of)["jit"]
    cost = {key: stub_driver.calls_of(call) for key, call in stub_driver.recorded_launchers(("spectral_norm",)).items()}
    assert cost["spectral_norm.forward", 11, 3] < 2 * jit, (cost, jit)
    assert cost["spectral_norm.backward", 11, 2] < 2 * jit, (cost, jit)


if __name__ == "__main__":
    stub_driver.run(globals())
