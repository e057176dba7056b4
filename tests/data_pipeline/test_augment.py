"""RandAugment and mixup."""

import numpy as np
import pytest
import torch

from visionmoe.data.mixup import mixup, step_generator
from visionmoe.data.randaugment import OPERATIONS, randaugment


@pytest.fixture
def photo() -> torch.Tensor:
    smooth = np.linspace(20, 220, 24 * 32 * 3).reshape(24, 32, 3)
    grain = np.random.default_rng(0).integers(-15, 16, smooth.shape)
    return torch.from_numpy((smooth + grain).astype(np.uint8)).permute(2, 0, 1).contiguous()


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("magnitude", [0, 10, 20, 30])
def test_operations_keep_shape_and_type(photo: torch.Tensor, name: str, channels: int, magnitude: float) -> None:
    image = photo[:channels]
    before = image.clone()
    result = OPERATIONS[name](image, magnitude / 10, np.random.default_rng(0))
    assert result.shape == image.shape and result.dtype == torch.uint8
    assert torch.equal(image, before)


def apply(name: str, image: torch.Tensor, magnitude: float) -> torch.Tensor:
    return OPERATIONS[name](image, magnitude / 10, np.random.default_rng(0))


def test_strengths_are_the_references(photo: torch.Tensor) -> None:
    assert torch.equal(apply("Invert", photo, 10), 255 - photo)
    assert torch.equal(apply("Posterize", photo, 10), photo // 16 * 16)  # int(10 / 10 * 4) = 4 bits
    assert torch.equal(apply("Posterize", photo, 20), photo)  # 8 bits
    assert torch.equal(apply("Solarize", photo, 5), torch.where(photo < 128, photo, 255 - photo))  # int(0.5 * 256)
    assert torch.equal(apply("Solarize", photo, 10), photo)  # no pixel reaches 256
    added = (photo.int() + 55).clamp(max=255).to(torch.uint8)  # int(0.5 * 110)
    assert torch.equal(apply("SolarizeAdd", photo, 5), torch.where(photo < 128, added, photo))
    # Brightness at magnitude 10 is 1.8 + 0.1 = 1.9 times.
    bright = (photo.float() * 1.9).clamp(max=255)
    assert (apply("Brightness", photo, 10).float() - bright).abs().max() <= 1
    # A factor of 1 leaves the image alone: 1.8 * 5 / 10 + 0.1.
    for name in ("Color", "Contrast", "Brightness", "Sharpness"):
        assert (apply(name, photo, 5).int() - photo.int()).abs().max() <= 1


def test_translation_is_in_proportion() -> None:
    image = torch.full((1, 10, 112), 7, dtype=torch.uint8)
    # 100 / 224 of 112 pixels are 50, to the right or to the left; grey comes in.
    moved = {tuple(apply_seed("TranslateX", image, 10, seed)[0, 0].tolist()) for seed in range(10)}
    assert moved == {(7,) * 62 + (128,) * 50, (128,) * 50 + (7,) * 62}


def apply_seed(name: str, image: torch.Tensor, magnitude: float, seed: int) -> torch.Tensor:
    return OPERATIONS[name](image, magnitude / 10, np.random.default_rng(seed))


def test_cutout_is_a_grey_square() -> None:
    image = torch.zeros((3, 56, 56), dtype=torch.uint8)
    for seed in range(20):
        cut = apply_seed("Cutout", image, 10, seed)
        assert set(cut.unique().tolist()) == {0, 128}
        assert 10 * 10 <= (cut[0] == 128).sum() <= 20 * 20  # 40 / 224 of 56 are 10 on every side of the centre


def test_follows_from_its_generator_alone(photo: torch.Tensor) -> None:
    results = []
    for seed in (5, 6):
        torch.manual_seed(seed)
        np.random.seed(seed)
        results.append(randaugment(photo, 2, 10, np.random.default_rng(1)))
    assert torch.equal(*results)
    variants = {randaugment(photo, 2, 10, np.random.default_rng(s)).numpy().tobytes() for s in range(50)}
    assert len(variants) > 35
    assert torch.equal(randaugment(photo, 0, 10, np.random.default_rng(1)), photo)


# Mixup


def test_mixup_by_hand() -> None:
    images = torch.eye(3).reshape(3, 1, 1, 3)
    labels = torch.eye(3)
    mixed, mixed_labels = mixup(images, labels, 0.5, step_generator(0, 7))
    weight = mixed_labels[0, 0].item()
    assert 0.5 <= weight < 1
    # Row i is weight * image i + (1 - weight) * image i + 1; the last is mixed with the first.
    other = 1 - weight
    expected = torch.tensor([[weight, other, 0], [0, weight, other], [other, 0, weight]])
    torch.testing.assert_close(mixed_labels, expected)
    torch.testing.assert_close(mixed.reshape(3, 3), expected)


def test_mixup_weights_are_those_of_a_sorted_dirichlet() -> None:
    one_hot = torch.eye(2)
    weights = [mixup(one_hot, one_hot, 0.2, step_generator(0, step))[1][0, 0].item() for step in range(2000)]
    expected = np.random.default_rng(0).dirichlet((0.2, 0.2), 20000).max(1)
    assert min(weights) >= 0.5
    assert np.mean(weights) == pytest.approx(expected.mean(), abs=0.015)
    assert np.std(weights) == pytest.approx(expected.std(), abs=0.015)


def test_mixup_follows_from_seed_and_step() -> None:
    x, y = torch.rand(4, 3, 2, 2), torch.eye(4)

    def draw(seed: int, step: int) -> torch.Tensor:
        torch.manual_seed(step + 99)
        return mixup(x, y, 0.5, step_generator(seed, step))[0]

    assert torch.equal(draw(1, 2), draw(1, 2))
    assert not torch.equal(draw(1, 2), draw(1, 3)) and not torch.equal(draw(1, 2), draw(2, 2))
    state = [step_generator(1, 2, purpose).initial_seed() for purpose in ("mixup", "noise")]
    assert state[0] != state[1]


def test_mixup_mistakes() -> None:
    x = torch.zeros(2, 1, 2, 2)
    with pytest.raises(ValueError, match="alpha must be > 0, got 0"):
        mixup(x, torch.eye(2), 0, step_generator(0, 0))
    with pytest.raises(ValueError, match=r"labels must be one-hot, \(2, classes\), got \(2,\)"):
        mixup(x, torch.zeros(2), 0.5, step_generator(0, 0))
