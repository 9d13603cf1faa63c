"""The drawn sets: functions of the index alone, and what their conditions say is in the pictures."""

from math import pi

import pytest
import torch

from gankern import data
from gankern.data import drawn
from gankern.data.shapes import RANGES

DRAWN = ("shapes", "plain", "striped", "edges", "captions", "turning", "photos")


@pytest.mark.parametrize("name", DRAWN)
def test_a_function_of_the_index_at_any_size(name):
    images = data.load(name, 32)
    some = torch.tensor([5, 77, 5])
    batch = images[some]
    assert batch.shape == (3, 3, 32, 32) and batch.dtype == torch.float32 and batch.abs().max() <= 1.0 + 1e-6
    assert torch.equal(batch[0], batch[2]) and torch.equal(batch[1], data.load(name, 32)[77])
    assert not torch.equal(batch[0], batch[1])
    assert data.load(name, 16)[some].shape == (3, 3, 16, 16)
    for kind in images.conditions:
        condition = data.condition(name, images, kind)
        assert len(condition) == len(images) and torch.equal(condition[some][1], condition[77])
    with pytest.raises(ValueError, match=f"{name} has 3 channels"):
        data.load(name, channels=1)


def test_a_condition_that_is_not_there():
    with pytest.raises(ValueError, match="plain has no captions; it has attributes"):
        data.condition("plain", data.load("plain"), "captions")
    with pytest.raises(ValueError, match="digits has no edges; it has nothing of the kind"):
        data.condition("digits", data.load("digits"), "edges")


def test_attributes_are_the_factors():
    shapes = data.load("shapes")
    factors, attributes = shapes.factors(torch.arange(200)), shapes.conditions["attributes"][:200]
    assert attributes.abs().max() <= 1.0
    assert torch.equal(attributes[:, :5].argmax(1), factors.kind) and torch.equal(
        attributes[:, :5].sum(1), torch.full((200,), -3.0)
    )
    torch.testing.assert_close(torch.atan2(attributes[:, 6], attributes[:, 5]) % (2 * pi), 2 * pi * factors.hue)
    low, high = RANGES["radius"]
    torch.testing.assert_close((attributes[:, 11] + 1) / 2 * (high - low) + low, factors.radius)


def test_the_two_domains_share_no_image_and_differ_by_stripes():
    plain, striped = data.load("plain"), data.load("striped")
    assert (plain.factors(torch.arange(500)).x[:, None] != striped.factors(torch.arange(500)).x).all()
    hidden = drawn.with_stripes(plain, torch.arange(64))
    difference = (hidden - plain[:64]).abs()
    assert difference.amax((1, 2, 3)).min() > 0.3  # every shape has stripes that can be seen
    assert difference[:, :, 0].max() < 0.7 and (difference.mean() > 0.01)


def test_edges_are_there_where_the_shape_ends_and_do_not_tell_its_hue():
    images = data.load("edges")
    edges = images.conditions["edges"]
    covered = drawn.coverage(images.factors(torch.arange(32)), 32)
    inside = torch.nn.functional.max_pool2d(-covered, 3, 1, 1) == -1  # all around covered
    outside = torch.nn.functional.max_pool2d(covered, 3, 1, 1) == 0
    assert (edges[:32][inside | outside] == -1).all() and (edges[:32].amax((1, 2, 3)) > 0.9).all()


def test_captions_say_what_is_in_the_picture():
    scenes = data.load("captions", 64)
    where = torch.arange(400)
    scene, pictures = scenes.scenes(where), scenes[where]
    for i in where.tolist():
        texts = drawn.read(scenes.conditions["captions"][i])
        assert texts == drawn.describe(scene, i) and len(set(texts)) == 5
        words = set(texts[0].split())
        assert drawn.COLOURS[scene.colour[i]] in words and drawn.NAMES[scene.kind[i]] in words
        assert (scene.relation[i] < 0) == bool(words & set(drawn.SIZES))
    # "left of": the first shape's colour lies in the left half. Red left of blue, so that a channel tells.
    chosen = [i for i in range(5000) if drawn.describe(scenes.scenes(torch.tensor([i])), 0)[0].startswith("a red")]
    scene, pictures = scenes.scenes(torch.tensor(chosen)), scenes[torch.tensor(chosen)]
    for relation, half in (("left of", (slice(None), slice(0, 32))), ("below", (slice(32, 64), slice(None)))):
        found = [
            i
            for i in range(len(chosen))
            if scene.relation[i] == drawn.RELATIONS.index(relation) and scene.other_colour[i] == 4
        ]
        assert found
        for i in found:
            red = (pictures[i, 0] > 0.5) & (pictures[i, 2] < 0.0)
            assert red.sum() > 0.9 * red.sum().clamp(min=1) and red[half].sum() > 0.8 * red.sum() > 0


def test_the_zero_shot_split():
    assert len(drawn.UNSEEN) == 6 and len(drawn.SEEN) == 24
    scene = drawn.Scenes().scenes(torch.arange(20_000))
    seen = set(zip(scene.kind.tolist(), scene.colour.tolist()))
    others = {
        pair for pair, r in zip(zip(scene.other_kind.tolist(), scene.other_colour.tolist()), scene.relation) if r >= 0
    }
    assert seen == others == set(drawn.SEEN)
    new = drawn.Scenes(unseen=True).scenes(torch.arange(1000))
    assert set(zip(new.kind.tolist(), new.colour.tolist())) == set(drawn.UNSEEN)


def test_texts_that_cannot_be_spelt():
    assert drawn.read(drawn.spell("A Red ring")[None]) == ["a red ring"]
    with pytest.raises(ValueError, match="letters a to z .* '!' among them"):
        drawn.spell("a ring!")
    with pytest.raises(ValueError, match="64 at most; got 65"):
        drawn.spell("a" * 65)


def test_the_future_is_ambiguous_and_the_past_is_not():
    turning = data.load("turning")
    signs = drawn.uniform(7, torch.arange(400), 2) >= 0.5
    assert 0.4 < (signs[:, 0] == signs[:, 1]).float().mean() < 0.6
    frames = turning.conditions["frames"][:8]
    assert torch.equal(frames[:, :3], turning.shapes[:8]) and torch.equal(
        frames[:, 9:], turning.frame(torch.arange(8), 3)
    )
    same = signs[:8, 0] != signs[:8, 1]  # turned back: the fifth frame is the third
    torch.testing.assert_close(turning[:8][same], frames[:, 6:9][same], atol=1e-4, rtol=0)
    on, back = turning.futures(torch.arange(8))
    torch.testing.assert_close(torch.where(same[:, None, None, None], back, on), turning[:8], atol=1e-6, rtol=0)
    torch.testing.assert_close(back, frames[:, 6:9], atol=1e-4, rtol=0)


def test_held_out_photographs_are_other_pixels():
    train, test = drawn.Photos(64), drawn.Photos(64, held_out=True)
    assert train[:4].shape == (4, 3, 64, 64)
    assert not torch.isclose(train[:64].mean((1, 2, 3))[:, None], test[:64].mean((1, 2, 3))).any()
    with pytest.raises(ValueError, match="photos: size must be from 4 to 192, got 200"):
        drawn.Photos(200)
