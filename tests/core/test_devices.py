"""What was measured on a device decides which implementation "auto" takes there, where there is one."""

import json
import math
import types
from types import SimpleNamespace

import pytest
import torch

from gankern.core import devices
from gankern.core.dispatch import Implementation, Primitive

TYPES = (torch.float32,)


@pytest.fixture
def primitive():
    there = [Implementation(name, ("cuda",), TYPES, 2) for name in ("triton", "cuda")]
    yield Primitive("of_two_tiers", (*there, Implementation("reference", (), (), 2)))
    Primitive.registry.pop("of_two_tiers")


@pytest.fixture
def device_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(name="GPU of tests"))


def test_without_a_measurement_it_is_triton(primitive, device_name, monkeypatch):
    monkeypatch.setattr(devices, "TIERS", {})
    assert primitive._decide("cuda", torch.float32, "auto") == "triton"
    monkeypatch.setattr(devices, "TIERS", {"Another GPU": {"of_two_tiers": "cuda"}})
    assert primitive._decide("cuda", torch.float32, "auto") == "triton"


def test_a_measurement_decides_where_that_implementation_can(primitive, device_name, monkeypatch):
    monkeypatch.setattr(devices, "TIERS", {"GPU of tests": {"of_two_tiers": "cuda"}})
    assert primitive._decide("cuda", torch.float32, "auto") == "cuda"
    assert primitive._decide("cuda", torch.float32, "triton") == "triton"  # a name goes first
    assert primitive._decide("cpu", torch.float32, "auto") == "reference"
    missing = Implementation("cuda", ("cuda",), TYPES, 2, "it was not built")
    primitive.implementations = (primitive.implementations[0], missing, primitive.implementations[2])
    assert primitive._decide("cuda", torch.float32, "auto") == "triton"
    with pytest.raises(ValueError, match="cuda: it was not built"):
        primitive._decide("cuda", torch.float32, "cuda")


def test_an_implementation_for_large_tensors(monkeypatch):
    tiers = Implementation("triton", ("meta",), TYPES, 2), Implementation("cuda", ("meta",), TYPES, 2, None, True)
    primitive = Primitive("of_two_tiers", (*tiers, Implementation("reference", (), (), 2)))
    small, large = (torch.empty(count, device="meta") for count in (2**24, 2**24 + 1))
    try:
        assert [primitive.select(x) for x in (small, large)] == ["triton", "triton"]  # nothing was measured
        monkeypatch.setattr(devices, "fastest", lambda name, device: "cuda")
        primitive._chosen.clear()
        assert [primitive.select(x) for x in (small, large, small)] == ["triton", "cuda", "triton"]
        assert primitive.select(small, "cuda") == "cuda"  # a name goes first
        # What it does not take otherwise runs as if there was none, or is an error by name.
        assert primitive.instead("cuda", "is for training", large, None) == "triton"
        with pytest.raises(ValueError, match="cuda: is for training"):
            primitive.instead("cuda", "is for training", large, "cuda")
    finally:
        Primitive.registry.pop("of_two_tiers")


def test_the_files_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(devices, "DEVICES", tmp_path)
    assert devices._of_all("tiers") == {}
    devices.device_file("A (1)").write_text(json.dumps({"device": "A (1)", "blocks": {}, "tiers": {"x": "cuda"}}))
    devices.device_file("B").write_text(json.dumps({"device": "B", "blocks": {"y": {}}}))  # of before there were tiers
    assert devices._of_all("tiers") == {"A (1)": {"x": "cuda"}}
    devices.measured.cache_clear()
    try:
        assert devices.measured("B")["blocks"] == {"y": {}} and devices.measured("C") == {}
        assert devices.measured("A  1 ") == {}  # whose file has this name, but is another device's
    finally:
        devices.measured.cache_clear()


def test_the_committed_files_name_what_there_is():
    for path in devices.DEVICES.glob("*.json"):
        content = json.loads(path.read_text())
        assert path == devices.device_file(content["device"])
        for name, tier in content.get("tiers", {}).items():
            assert tier in [i.name for i in Primitive.registry[name].implementations]


def test_what_accelerate_gains_is_known_of_measured_devices_alone(monkeypatch):
    gpu = torch.device("cuda", 1)
    asked = []

    def facts(device):
        asked.append(device)
        return types.SimpleNamespace(name="GPU of tests")

    monkeypatch.setattr(torch.cuda, "get_device_properties", facts)
    monkeypatch.setattr(devices, "ACCELERATED", {})
    assert devices.gains_from("pairs", gpu) == math.inf and not asked
    monkeypatch.setattr(
        devices, "ACCELERATED", {"GPU of tests": {"pairs": 4096}, "Another GPU": {"second derivative": 0}}
    )
    assert devices.gains_from("pairs", gpu) == 4096 and asked == [gpu]
    assert devices.gains_from("second derivative", gpu) == math.inf
    assert devices.gains_from("pairs", torch.device("meta")) == math.inf
