"""What the models reach: figures of merit after a stated budget, each from one `gankern train` command.

    python benchmarks/quality.py --out runs/quality            all runs; one that was stopped goes on where it was
    python benchmarks/quality.py --only 8gaussians --seeds 0

Writes quality.json and quality.md, the table, to --out, and prints every command before it runs.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev

# What a run is called → the arguments of `gankern train`, without seed, layers and output folder; whether torch's
# layers are trained as well. The budgets are of minutes on one core.
TOY = "--width 128 --lr 1e-3 --ema 0.999 --checkpoint-every 500"
MNIST = "--data mnist5k --ema 0.99 --evaluate 1 --evaluate-samples 1000"
RUNS = {
    "8gaussians": (f"wgan_gp_toy --data 8gaussians {TOY} --steps 6000 --decay-steps 6000", False),
    "25gaussians": (f"wgan_gp_toy --data 25gaussians {TOY} --steps 2000 --decay-steps 2000", False),
    "dcgan": (f"dcgan {MNIST} --width 16 --lr 1e-3 --steps 800 --checkpoint-every 400", True),
    "wgan_gp": (f"wgan_gp {MNIST} --width 16 --n-critic 2 --lr 1e-3 --steps 150 --checkpoint-every 75", True),
    "sn_dcgan": (f"sn_dcgan {MNIST} --steps 600 --checkpoint-every 300", True),
    "progan": (
        "progan --data shapes --size 64 --resize --width 32 --batch-size 8 --lr 3e-3 --grow-steps 300 --steps 3000 "
        "--ema 0.99 --checkpoint-every 100",
        False,
    ),
}
FIGURES = {
    "modes_covered": "modes covered",
    "high_quality": "within 3 std",
    "sliced_wasserstein": "sliced W",
    "fid_own_classifier": "FID, own classifier",
    "inception_score_own_classifier": "IS, own classifier",
    "kid_own_classifier": "KID, own classifier",
    "swd": "SWD x 1000",
}


def train(name: str, arguments: str, layers: str, seed: int, out: Path, threads: int) -> dict:
    """The record of a run, which is trained now unless it is there."""
    record = out / "record.json"
    if not record.is_file():
        command = [sys.executable, "-m", "gankern.cli", "train", *shlex.split(arguments)]
        command += ["--layers", layers, "--seed", str(seed), "--threads", str(threads), "--out", str(out)]
        if (out / "checkpoint.pt").is_file():
            command = [*command[:3], "train", "--resume", "--out", str(out)]
        print(shlex.join(["gankern", *command[3:]]), flush=True)
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return json.loads(record.read_text())


def summary(name: str, layers: str, records: Sequence[dict]) -> dict:
    found = [record.get("figures", {}).get(layers, {}) for record in records]
    seconds = [
        1e-3 * record["sides"][layers]["median_milliseconds"]["whole step"] * record["steps"] for record in records
    ]
    return {
        "run": name,
        "layers": layers,
        "seeds": [record["config"]["seed"] for record in records],
        "steps": records[0]["steps"],
        "seconds": [round(s, 1) for s in seconds],
        "figures": {key: [figures[key] for figures in found] for key in found[0]},
        "hardware": records[0]["hardware"],
    }


def report(out: Path) -> None:
    """Writes quality.json and quality.md, of all runs in the folder that are finished."""
    rows = []
    for name in RUNS:
        for layers in ("torch", "gankern"):
            files = sorted(out.glob(f"{name}-{layers}-*/record.json"))
            if files:
                rows.append(summary(name, layers, [json.loads(file.read_text()) for file in files]))
    (out / "quality.json").write_text(json.dumps(rows, indent=1) + "\n")
    (out / "quality.md").write_text(markdown(rows))


def markdown(rows: Sequence[dict]) -> str:
    lines = ["| run | layers | seeds | steps | seconds | figures, mean ± std over the seeds |", "|---" * 6 + "|"]
    for row in rows:
        parts = []
        for key, label in FIGURES.items():
            values = row["figures"].get(key)
            if values is None:
                continue
            text = f"{mean(values):.4g}" + (f" ± {stdev(values):.2g}" if len(values) > 1 else "")
            if key in ("modes_covered", "high_quality"):
                text = ", ".join(f"{v:.1%}" if key == "high_quality" else f"{v:g}" for v in values)
            parts.append(f"{label} {text}")
        seeds = ", ".join(map(str, row["seeds"]))
        cells = [row["run"], row["layers"], seeds, row["steps"], f"{mean(row['seconds']):.0f}", "; ".join(parts)]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/quality"))
    parser.add_argument("--only", nargs="+", choices=RUNS, default=list(RUNS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    for name in options.only:
        arguments, both = RUNS[name]
        for layers in ("torch", "gankern") if both else ("gankern",):
            for seed in options.seeds:
                train(name, arguments, layers, seed, options.out / f"{name}-{layers}-{seed}", options.threads)
                report(options.out)
    print((options.out / "quality.md").read_text())


if __name__ == "__main__":
    main()
