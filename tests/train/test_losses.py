import math

import pytest
import torch

from visionmoe.train.losses import create_loss, ensemble_log_probs, smooth_labels


def test_softmax_by_hand():
    logits = torch.tensor([[0.0, math.log(3.0)], [math.log(4.0), 0.0]])  # probs (1/4, 3/4), (4/5, 1/5)
    targets = torch.tensor([[0.0, 1.0], [0.5, 0.5]])
    expected = (-math.log(0.75) - 0.5 * math.log(0.8) - 0.5 * math.log(0.2)) / 2
    assert create_loss("softmax")(logits, targets).item() == pytest.approx(expected)


def test_sigmoid_sums_over_classes_and_averages_rows():
    logits = torch.tensor([[0.0, 0.0], [math.log(3.0), 0.0]])
    targets = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    # row 1: 2 log 2; row 2: -log(3/4) + log 2
    expected = (2 * math.log(2) - math.log(0.75) + math.log(2)) / 2
    assert create_loss("sigmoid")(logits, targets).item() == pytest.approx(expected)


@pytest.mark.parametrize("name", ["softmax", "sigmoid"])
def test_ensemble_trains_each_member_on_the_images_targets(name):
    torch.manual_seed(0)
    logits, targets = torch.randn(6, 4), torch.eye(4)[:3]  # 3 images, M = 2, copies adjacent
    loss = create_loss(name)
    members = [loss(logits[m::2], targets) for m in range(2)]
    torch.testing.assert_close(loss(logits, targets), sum(members) / 2)


def test_ensemble_log_probs_average_probabilities():
    logits = torch.randn(6, 4)
    probs = logits.softmax(-1).view(3, 2, 4).mean(1)
    torch.testing.assert_close(ensemble_log_probs(logits, 2), probs.log())


def test_label_smoothing_keeps_the_sum():
    smoothed = smooth_labels(torch.tensor([[1.0, 0.0, 0.0, 0.0]]), 0.2)
    torch.testing.assert_close(smoothed, torch.tensor([[0.85, 0.05, 0.05, 0.05]]))


def test_is_float32_for_bfloat16_logits():
    logits = torch.randn(4, 10, dtype=torch.bfloat16)
    loss = create_loss("softmax")(logits, torch.eye(10)[:4])
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, create_loss("softmax")(logits.float(), torch.eye(10)[:4]))


def test_mistakes_are_one_clear_error():
    with pytest.raises(ValueError, match="loss must be one of softmax, sigmoid, got 'hinge'"):
        create_loss("hinge")
    with pytest.raises(ValueError, match=r"label_smoothing must be >= 0 and < 1, got 1\.5"):
        create_loss("softmax", 1.5)
    with pytest.raises(ValueError, match=r"got \(4, 10\) and \(3, 10\)"):
        create_loss("softmax")(torch.zeros(4, 10), torch.zeros(3, 10))
