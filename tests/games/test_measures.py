"""Readers: what a classifier or a regressor reads off images is worth as much as what it reads off real ones."""

import pytest
import torch

from gankern import metrics
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
