"""The bars: what this library promises, and whether the records of gpu.py meet it.

A bar has a figure only if that was measured; what was to be measured and has no figure is listed as such. Nothing here
needs a GPU, or torch.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Layers that `accelerate` replaces, or leaves where it knows no gain, by name.
LAYERS = (
    "LeakyReLU",
    "BatchNorm2d LeakyReLU",
    "InstanceNorm2d ReLU",
    "GroupNorm LeakyReLU",
    "Conv2d LeakyReLU",
    "Upsample Conv2d",
    "Conv2d AvgPool2d",
    "ConvTranspose2d BatchNorm2d ReLU",
    "SpectralNorm LeakyReLU",
    "HookedSpectralNorm LeakyReLU",
)
LAYER_SIZES = {"16 maps of 8x8": (16, 64, 8, 8), "64 maps of 32x32": (64, 128, 32, 32)}
LAYER_MODES = ("forward", "forward + backward", "forward + backward, graphed", "penalty")
IN_TRITON, IN_CUDA = "gankern, triton", "gankern, cuda"

PRIMITIVE_SHARE = {"upfirdn2d": 0.6}  # of the memory limit, forward + backward; of others:
SHARE = 0.85
SPECTRAL = "spectral_norm {}, grouped"
WIDE = SPECTRAL.format("1024 x 8192")
BACKWARD = "forward + backward"
# (start of the case's name, mode, what the peers' names contain, how many times as fast)
OF_THEIR_OWN = [
    *((SPECTRAL.format(network), BACKWARD, "parametrization", least)
      for network, least in (("SN-DCGAN-64 discriminator", 8.0), ("SNGAN-32 discriminator", 8.0),
                             ("BigGAN-128 discriminator", 5.0))),
    *((SPECTRAL.format(network), BACKWARD, "compiled", 2.0)
      for network in ("SN-DCGAN-64 discriminator", "SNGAN-32 discriminator", "BigGAN-128 discriminator",
                      "1024 x 8192")),
    *((f"minibatch_discrimination N={count} B=100 C=5", mode, "", least)
      for count, least in ((64, 2.0), (256, 3.0), (1024, 20.0))
      for mode, least in ((BACKWARD, least), ("double backward", 10.0))),
]  # fmt: skip
LARGE = [
    "bias_act",
    "bias_act_pixel_norm",
    "batch_norm_act",
    "minibatch_stddev",
    "virtual_batch_norm",
    "upfirdn2d up",
    "upfirdn2d down",
    "upfirdn2d same",
    "instance_norm_act",
    "group_norm_act",
    "gradient_penalty",
]
PRECISIONS = {False: "fp32", True: "bf16 channels_last"}
# Of whole steps, by the start of their names: how many times as fast as the fastest of torch's.
STEP_RATIOS = {
    "WGAN-GP": 2.5,
    "SN-GAN": 1.8,
    "ProGAN-64": 1.7,
    "ProGAN-256": 1.7,
    "DCGAN-64, batch 64": 1.25,
    "DCGAN-64, batch 256": 1.25,
}
EAGER_RATIOS = {step: {"WGAN-GP": 1.5, "SN-GAN": 1.4}.get(step, 1.0) for step in STEP_RATIOS}
NOT_SLOWER = 0.95  # one run of a few milliseconds cannot tell less apart
SANITIZERS = ("memcheck", "racecheck")


def is_fine(row: dict[str, Any]) -> bool:
    """Whether a process of pytest passed; 5: nothing was chosen for it."""
    return row["status"] in (0, 5)


def _against(peer: str) -> str:
    return f"against the fastest {peer or 'peer'}"


def _merged(rows: Sequence[dict[str, Any]], *keys: str) -> list[dict[str, Any]]:
    """Joins rows with the same keys, whose contenders were recorded one after the other."""
    merged: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        if "contenders" in row and all(key in row for key in keys):
            together = merged.setdefault(tuple(row[key] for key in keys), {**row, "contenders": {}})
            together["contenders"] |= row["contenders"]
    return list(merged.values())


def of_the_file(tiers: dict[str, str], primitive: str, times: dict[str, Any]) -> float | None:
    """The time of the contender of this library that runs on a device whose file has these tiers: CUDA C++ where that
    was worth it, otherwise Triton, however little slower it is. None if it has no figure."""
    chosen = IN_CUDA if tiers.get(primitive) == "cuda" else IN_TRITON if IN_TRITON in times else "gankern"
    return times[chosen] if isinstance(times.get(chosen), float) else None


def _by_blocks(out: Path) -> dict[str, float]:
    """The milliseconds of the device stage's cases, by label, with the block sizes that were chosen."""
    chosen = record_of(out, "variants").get("device_file", {}).get("blocks", {})
    found: dict[str, float] = {}
    for row in results(out, "variants"):
        if isinstance(row.get("ms"), dict) and "kernel" in row and chosen.get(row["kernel"]) == row["variant"]:
            found |= {label: ms for label, ms in row["ms"].items() if isinstance(ms, float)}
    return found


def bars(out: Path) -> list[dict[str, Any]]:
    """Each bar, the figure that those get who commit the device's file, and whether it is met."""
    found: list[dict[str, Any]] = []
    tiers, by_blocks = record_of(out, "variants").get("device_file", {}).get("tiers", {}), _by_blocks(out)

    def bar(name: str, figure: float, least: float) -> None:
        found.append({"bar": name, "figure": round(figure, 3), "least": least, "met": figure >= least})

    for row in _merged(results(out, "device"), "case", "dtype", "layout", "limit_ms"):
        label = f"{row['case']}, {row['dtype']}, {row['layout']}"
        times = {name: c.get("f+b") for name, c in row["contenders"].items() if isinstance(c, dict)}
        primitive = row["case"].split()[0]
        if label in by_blocks:
            times["gankern"] = by_blocks[label]
        ours = of_the_file(tiers, primitive, times)
        if ours is None:
            continue
        if "large" in row["case"]:
            bar(f"{label}: share of the copy limit", row["limit_ms"] / ours, PRIMITIVE_SHARE.get(primitive, SHARE))
        if isinstance(times.get("compiled"), float):
            bar(f"{label}: against torch.compile", times["compiled"] / ours, 1.5 if "upfirdn2d" in label else 1.0)
    own = _merged(results(out, "device"), "case", "mode")
    for start, mode, peer, least in OF_THEIR_OWN:
        for row in own:
            if row["mode"] != mode or not row["case"].startswith(start):
                continue
            times = {name: ms for name, ms in row["contenders"].items() if isinstance(ms, float)}
            mine = of_the_file(tiers, row["case"].split()[0], times)
            # "parametrization" is torch's as it comes; "" is whatever is fastest.
            peers = [ms for name, ms in times.items() if not name.startswith("gankern") and peer in name
                     and ("compiled" in name) <= (peer != "parametrization")]  # fmt: skip
            if mine is not None and peers:
                bar(f"{row['case']}, {mode}: {_against(peer)}", min(peers) / mine, least)
    bandwidth = record_of(out, "device").get("copy_bandwidth")
    for row in own:
        ours = of_the_file(tiers, row["case"].split()[0], row["contenders"])
        if (row["case"], row["mode"]) == (WIDE, BACKWARD) and ours is not None and bandwidth:
            limit = 7 * 1024 * 8192 * 4 / bandwidth * 1e3  # 2 reads and 1 write forward, 3 and 1 backward
            bar(f"{WIDE}: share of the copy limit", limit / ours, 1 / 1.5)
    for row in _merged(results(out, "steps"), "step", "mode", "fast"):
        times = {name: c["ms"] for name, c in row["contenders"].items() if isinstance(c, dict)}
        ours, peers = times.get("gankern"), [t for n, t in times.items() if n.startswith("torch") and "accel" not in n]
        if ours is None or not peers:
            continue
        ratios = STEP_RATIOS if row["mode"].endswith("graphed") else EAGER_RATIOS
        least = next((ratio for start, ratio in ratios.items() if row["step"].startswith(start)), 1.0)
        label = f"{row['step']}, {PRECISIONS[row['fast']]}, {row['mode']}"
        bar(f"{label}: against the fastest of torch's", min(peers) / ours, least)
    for row in results(out, "steps"):
        times = row.get("contenders", {}) if "layers" in row else {}
        if len(times) == 2 and all(isinstance(ms, float) for ms in times.values()):
            label = f"accelerate, {row['layers']}, {row['size']}, {row['mode']}"
            bar(f"{label}: against the original", times["original"] / times["accelerated"], NOT_SLOWER)
    states: dict[str, bool] = {}
    for row in results(out, "tests"):
        states[row["what"]] = states.get(row["what"], True) and is_fine(row)
    for row in results(out, "sanitizer"):
        if "tool" in row:
            name = f"compute-sanitizer {row['tool']}"
            states[name] = states.get(name, True) and is_fine(row)
    for what, fine in states.items():
        bar(f"{what} without a failure", float(fine), 1.0)
    return found + _without_figures(found, out)


def _without_figures(found: Sequence[dict[str, Any]], out: Path) -> list[dict[str, Any]]:
    """The bars for which the records hold no figure: nothing ran, or what ran failed."""
    kinds = [f"{dtype}, {layout}" for dtype in ("float32", "bfloat16") for layout in ("contiguous", "channels_last")]
    modes = {"whole step, graphed": STEP_RATIOS, "whole step": EAGER_RATIOS}
    large = [f"{name} large, {kind}" for name in LARGE for kind in kinds]
    asked = [
        *(("device", case, ": share of the copy limit") for case in large),
        *(("device", case, ": against torch.compile") for case in large),
        *(("device", start, f", {mode}: {_against(peer)}") for start, mode, peer, _ in OF_THEIR_OWN),
        *(("steps", step, f", {kind}, {mode}:") for mode, ratios in modes.items() for step in ratios
          for kind in PRECISIONS.values()),
        ("device", WIDE, ": share of the copy limit"),
        *(("steps", f"accelerate, {names}, {size}, {mode}", ": against the original")
          for names in LAYERS for size in LAYER_SIZES for mode in LAYER_MODES),
        ("tests", "tests without a failure", ""),
        ("tests", "tests of CUDA C++ without a failure", ""),
        *(("sanitizer", f"compute-sanitizer {tool} without a failure", "") for tool in SANITIZERS),
    ]  # fmt: skip
    missing = []
    for stage, start, within in asked:
        if not (out / f"{stage}.json").exists():
            continue  # nobody asked for that stage
        if not any(row["bar"].startswith(start) and within in row["bar"] for row in found):
            missing.append({"bar": start + within.rstrip(":"), "figure": None, "met": False})
    return missing


def record_of(out: Path, stage: str) -> dict[str, Any]:
    path = out / f"{stage}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def results(out: Path, stage: str) -> list[dict[str, Any]]:
    return record_of(out, stage).get("results", [])
