"""Which implementation runs, why another does not, and what asking costs."""

import logging
import os
import subprocess
import sys

import pytest
import torch

import gankern
import gankern.functional as GF
from gankern.core.dispatch import ANY_ORDER, Implementation, Primitive
from gankern.ops.spectral_norm import primitive


def call(**options):
    return GF.spectral_norm(torch.ones(4, 6), torch.ones(4), torch.ones(6), **options)


def test_auto_keyword_context_and_variable():
    call()
    assert gankern.last_implementation("spectral_norm") == "cpu"
    call(implementation="reference")
    assert gankern.last_implementation("spectral_norm") == "reference"
    with gankern.use_implementation("reference"):
        call()
        assert gankern.last_implementation("spectral_norm") == "reference"
        call(implementation="cpu")  # a call's own keyword goes first
        assert gankern.last_implementation("spectral_norm") == "cpu"
        with gankern.use_implementation("auto"):
            call()
            assert gankern.last_implementation("spectral_norm") == "cpu"
    call()
    assert gankern.last_implementation("spectral_norm") == "cpu"
    script = (
        "import torch, gankern, gankern.functional as GF\n"
        "assert gankern.last_implementation('spectral_norm') is None\n"
        "GF.spectral_norm(torch.ones(4, 6), torch.ones(4), torch.ones(6))\n"
        "print(gankern.last_implementation('spectral_norm'))"
    )
    run = subprocess.run([sys.executable, "-c", script], env=os.environ | {"GANKERN_IMPLEMENTATION": "reference"},
                         capture_output=True, text=True, check=True)  # fmt: skip
    assert run.stdout.strip() == "reference"


def test_a_named_implementation_runs_or_says_why_of_every_one():
    with pytest.raises(ValueError) as raised:
        GF.spectral_norm(torch.ones(4, 6, device="meta"), torch.ones(4, device="meta"), torch.ones(6, device="meta"),
                         implementation="cpu")  # fmt: skip
    message = str(raised.value)
    assert "'cpu' cannot take these inputs" in message
    assert "cpu: runs on cpu tensors, got a meta tensor" in message
    assert "reference: can" in message
    with pytest.raises(ValueError, match="name is 'fast'; accepted are auto, reference, cpu, triton, cuda"):
        with gankern.use_implementation("fast"):
            pass
    with pytest.raises(ValueError, match="no primitive is called 'deconvolution'"):
        gankern.last_implementation("deconvolution")


def test_auto_falls_back_once_and_says_so(caplog):
    broken = Implementation("cpu", ("cpu",), (), 2, "the native library was not built")
    fallback = Primitive("test_fallback", (broken, Implementation("reference", (), (), ANY_ORDER)))
    try:
        with caplog.at_level(logging.WARNING, logger="gankern"):
            for _ in range(3):
                assert fallback.select(torch.ones(1)) == "reference"
        assert [r.message for r in caplog.records] == [
            "test_fallback runs as plain PyTorch for cpu float32 (cpu: the native library was not built)"
        ]
    finally:
        del Primitive.registry["test_fallback"]


def test_meta_tensors_take_the_reference():
    out = GF.spectral_norm(*(torch.ones(s, device="meta") for s in [(4, 6), (4,), (6,)]))
    assert out.shape == (4, 6)
    assert out.device.type == "meta"


def test_selection_calls_little():
    """Counted: a time would be the machine's."""
    tensor, events = torch.ones(1), []
    sys.setprofile(lambda frame, event, arg: events.append(event))
    try:
        primitive.select(tensor)
    finally:
        sys.setprofile(None)
    assert events.count("call") + events.count("c_call") < 20, events


def test_compiled_code_follows_use_implementation():
    torch._dynamo.reset()
    compiled = torch.compile(lambda w, u, v: GF.spectral_norm(w, u, v, training=False), backend="eager", fullgraph=True)
    args = torch.rand(4, 6), torch.ones(4), torch.ones(6)
    compiled(*args)
    assert gankern.last_implementation("spectral_norm") == "cpu"
    with gankern.use_implementation("reference"):
        compiled(*args)
    assert gankern.last_implementation("spectral_norm") == "reference"


IMPORTS = {
    "light, and compiles nothing": (
        "import sys, gankern\n"
        "heavy = {'triton', 'matplotlib', 'typer', 'rich', 'sklearn', 'torch._dynamo'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    ),
    "a module that is at home elsewhere, by both names and not before somebody asks": (
        "import sys, gankern; assert 'torch' not in sys.modules; import gankern.filters; from gankern.filters import fir;"
        "import gankern.functional.filters as home; assert gankern.filters is home and fir is home.fir;"
        "assert sys.modules['gankern.filters'] is home"
    ),
}


@pytest.mark.parametrize("what", IMPORTS)
def test_import(what):
    subprocess.run([sys.executable, "-c", IMPORTS[what]], check=True)


def test_the_first_call_of_a_process_may_be_compiled():
    script = (
        "import torch, gankern, gankern.functional as GF\n"
        "f = torch.compile(lambda w, u, v: GF.spectral_norm(w, u, v), backend='eager', fullgraph=True)\n"
        "f(torch.rand(4, 6, requires_grad=True), torch.ones(4), torch.ones(6)).sum().backward()\n"
        "print(gankern.last_implementation('spectral_norm'))"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "cpu"
