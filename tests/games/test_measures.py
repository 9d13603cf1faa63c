"""Readers: what a classifier or a regressor reads off images is worth as much as what it reads off real ones."""

import pytest
import torch

from gankern import data, metrics
from gankern.games import _measures


@pytest.mark.parametrize(("accuracy", "trained"), [(0.67, [250, 2]), (0.98, [250])])
def test_a_reader_that_does_not_read_real_images_is_trained_longer(monkeypatch, accuracy, trained):
    steps = []

    def train(name, size, number=250, seed=0):
        steps.append(number)
        logits = torch.eye(3)[2 if number == 250 else 1]
        return metrics.Extractor(lambda x: (x.flatten(1), logits.expand(len(x), 3))), accuracy

    monkeypatch.setattr(metrics, "train_classifier", train)
    _measures.reader.cache_clear()
    try:
        for _ in range(2):  # and kept
            seen = _measures.read_classes(torch.zeros(4, 3, 8, 8), "shapes", 8)
        assert seen.tolist() == [2 if len(trained) == 1 else 1] * 4 and steps == trained
    finally:
        _measures.reader.cache_clear()


def test_a_regressor_reads_images_with_a_grain():
    """As those of small generators have it; one that was trained on clean images finds 0.3 of what there is."""
    shapes = data.Shapes(16, 700)
    asked, before, after = shapes.conditions["attributes"][:], slice(0, 500), slice(500, 700)
    read = _measures.regressor(shapes[before], asked[before], [_measures.PLACES["x"]], 60)
    grain = 0.15 * torch.randn(200, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    found = read(shapes[after] + grain).features[:, 0]
    assert _measures.explained(found, asked[after, _measures.PLACES["x"]]) >= 0.8
