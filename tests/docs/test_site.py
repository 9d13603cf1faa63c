"""The docs as a site: it is built strictly, without network, and has a page for every command and every public name."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from gankern.cli import COMMANDS

ROOT = Path(__file__).parents[2]

if not all(importlib.util.find_spec(name) for name in ("mkdocs", "material", "mkdocstrings")):
    pytest.skip("the docs extra is not installed", allow_module_level=True)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    nowhere = "http://127.0.0.1:9"
    environment = os.environ | {"http_proxy": nowhere, "https_proxy": nowhere, "NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_every_command_has_a_page(site):
    for name, sentence in COMMANDS.items():
        page = (site / "commands" / name / "index.html").read_text()
        assert sentence.split(",")[0] in page
    assert "--start-from" in (site / "commands" / "train" / "index.html").read_text()


def test_the_api_is_there(site):
    for page, names in {
        "functional": ("upfirdn2d", "spectral_norm", "bias_act"),
        "nn": ("MinibatchDiscrimination", "BatchNormAct2d", "UpsampleConv2d"),
        "penalties": ("critic_step", "r1_penalty"),
        "training": ("load_generator", "configure"),
    }.items():
        text = (site / "api" / page / "index.html").read_text()
        for name in names:
            assert re.search(rf'id="gankern\.[\w.]*\.?{name}"', text), (page, name)


def test_every_page_is_in_the_contents(site):
    home = (site / "index.html").read_text()
    for page in (ROOT / "docs").rglob("*.md"):
        name = page.relative_to(ROOT / "docs").with_suffix("").as_posix()
        assert name == "index" or f'href="{name}/"' in home, name


def test_the_pages_fetch_nothing(site):
    text = "".join(path.read_text() for path in (site / "index.html", site / "quickstart" / "index.html"))
    assert not re.findall(r'<(?:script|link|img)[^>]+(?:src|href)="https?://', text)
