#!/usr/bin/env bash
# A transcript of the first ten minutes, on a clean virtual environment: the wheel without native code, the extras from where pip
# takes its packages, and the first page of docs/quickstart.md in an empty folder.
#
#     tests/native/first_ten_minutes.sh FOLDER
set -euo pipefail
source=$(cd "$(dirname "$0")/../.." && pwd)
mkdir -p "$1" && cd "$1"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check "setuptools>=77" wheel
GANKERN_BUILD_NATIVE=0 venv/bin/pip wheel --quiet --disable-pip-version-check --no-deps --no-build-isolation --wheel-dir . "$source"
venv/bin/pip install --quiet --disable-pip-version-check -c "$source/constraints.txt" "$(ls "$PWD"/gankern-*.whl)[train,export,metrics]"
export PATH=$PWD/venv/bin:$PATH COLUMNS=100
python - <<'PYTHON'
from pathlib import Path
from PIL import Image
from gankern import data
from gankern.training import pictures

images, labels = data.load("digits", 16), data.labels("digits")
for i in range(60):
    path = Path("pictures") / f"digit {labels[i]}" / f"{i}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pictures.pixels(images[i : i + 1])[0, :, :, 0]).save(path)
PYTHON
sed -n '/^gankern info$/,/^```$/p' "$source/docs/quickstart.md" | grep '^gankern ' | while read -r line; do
    echo "\$ $line"
    eval "$line" </dev/null || echo "(exit code $?)"  # verify has nothing to verify without the native library, and says so
done
