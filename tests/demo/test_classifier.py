"""The judge must be right about the renderer before it judges a model."""

from __future__ import annotations

import pytest
import torch
from pack.demo import classifier
from pack.demo.figures import OTHER_SIZES, SQUARE, drawn, scenes_to_judge, to_tensor
from safetensors.torch import save_file


@pytest.mark.parametrize("size", [SQUARE, *OTHER_SIZES])
def test_it_knows_the_renderers_pictures_at_every_size(size) -> None:
    scenes = scenes_to_judge(60 if size == SQUARE else 24)
    images = to_tensor([drawn(scene, size) for scene in scenes])
    hits = classifier.right(classifier.load(), images, scenes)
    assert min(share.float().mean() for share in hits.values()) >= 0.98


def test_another_file_is_not_taken_for_it(tmp_path) -> None:
    save_file({"weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"other\.safetensors"):
        classifier.load(tmp_path / "other.safetensors")


def test_the_distance_of_a_set_to_itself_is_nothing_and_grows_with_a_shift() -> None:
    features = torch.randn(400, 8, generator=torch.Generator().manual_seed(1))
    assert classifier.frechet(features, features) == pytest.approx(0, abs=1e-6)
    assert classifier.frechet(features, features + 2) == pytest.approx(8 * 4, rel=1e-3)
