"""What a classifier reads off scenes of one or two shapes: whether they are what their captions say."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gankern import metrics
from gankern.data.drawn import COLOURS, NAMES, Scene, Scenes
from gankern.metrics.extractors import Classifier

# What is read, and how many kinds of it there are: of the shape that is left or on top (or alone), of the other, and
# along which axis they lie.
HEADS = {"kind": len(NAMES), "colour": len(COLOURS), "other_kind": len(NAMES), "other_colour": len(COLOURS), "axis": 2}


def in_place(scene: Scene) -> dict[str, Tensor]:
    """The right answers for each scene, [N] each; -1 where there is none."""
    two, turned = scene.relation >= 0, (scene.relation == 1) | (scene.relation == 3)  # right of, below
    return {
        "kind": torch.where(turned, scene.other_kind, scene.kind),
        "colour": torch.where(turned, scene.other_colour, scene.colour),
        "other_kind": torch.where(two, torch.where(turned, scene.kind, scene.other_kind), -1),
        "other_colour": torch.where(two, torch.where(turned, scene.colour, scene.other_colour), -1),
        "axis": torch.where(two, (scene.relation >= 2).long(), -1),
    }


class SceneReader:
    """A small network that was trained on real scenes, those with unseen combinations among them."""

    def __init__(self, size: int, number: int, steps: int):
        sets, indices = [Scenes(size, seed=1, unseen=unseen) for unseen in (False, True)], torch.arange(number)
        images = torch.cat([scenes[indices] for scenes in sets])
        answers = [in_place(scenes.scenes(indices)) for scenes in sets]
        right = {name: torch.cat([answer[name] for answer in answers]) for name in HEADS}
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)  # of the CPU alone
            network = Classifier(size, 3, sum(HEADS.values()))
            optimiser = torch.optim.Adam(network.parameters())
            schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 1e-2, total_steps=steps)
            for _ in range(steps):
                batch = torch.randint(len(images), (100,))
                parts = network(images[batch])[1].split(list(HEADS.values()), 1)
                losses = [F.cross_entropy(x, right[n][batch], ignore_index=-1) for n, x in zip(HEADS, parts)]
                optimiser.zero_grad()
                torch.stack(losses).sum().backward()
                optimiser.step()
                schedule.step()
        network.eval().requires_grad_(False)
        self.network = metrics.Extractor(lambda x: network(x)[1])

    def read(self, images: Tensor) -> dict[str, Tensor]:
        """log p of each answer, [N, kinds of it]."""
        logits = self.network(images.clamp(-1.0, 1.0)).features
        return {name: part.log_softmax(1) for name, part in zip(HEADS, logits.split(list(HEADS.values()), 1))}

    def score(self, images: Tensor, scene: Scene) -> dict[str, float]:
        """``shape``: of scenes of one, the share whose colour and kind are both read as asked. ``relation``: of scenes
        of two, the share that lie along the right axis, with colours that fit better as asked than exchanged."""
        found, asked = self.read(images), in_place(scene)
        right = {name: found[name].argmax(1) == asked[name] for name in HEADS}
        one = scene.relation < 0
        scores = {"shape": (right["kind"] & right["colour"])[one].float().mean().item()}

        def fits(first: str, second: str) -> Tensor:
            places = zip(("colour", "other_colour"), (first, second))
            return torch.stack([found[x].gather(1, asked[y].clamp(min=0)[:, None])[:, 0] for x, y in places]).sum(0)

        ordered = (fits("colour", "other_colour") > fits("other_colour", "colour")) | (
            asked["colour"] == asked["other_colour"]
        )
        return scores | {"relation": (right["axis"] & ordered)[~one].float().mean().item()}


def scene_figures(size: int, samples: Scenes, number: int) -> Callable[[Any], dict[str, float]]:
    """A function game -> figures, by ``game.sample(texts)``: of new captions, and of unseen combinations."""
    reader, indices = SceneReader(size, number, number // 3), torch.arange(number // 2)
    sets = [Scenes(size, seed=samples.seed + 2, unseen=unseen) for unseen in (False, True)]
    scenes = [of.scenes(indices) for of in sets]
    texts = [of.conditions["captions"][indices][:, 0] for of in sets]

    def figures(game: Any) -> dict[str, float]:
        seen, unseen = (reader.score(game.sample(t), scene) for t, scene in zip(texts, scenes))
        return {**seen, "unseen_shape": unseen["shape"]}

    return figures
