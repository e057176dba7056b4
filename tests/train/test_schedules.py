import numpy as np
import pytest

from visionmoe.train.schedules import create_schedule, rate_schedule

# The options with which the reference made units/schedules.npz (100 steps).
CONFIGS = {
    "constant": {"value": 0.1},
    "warmup_linear_decay": {"peak_value": 8e-4, "end_value": 1e-5, "warmup_steps": 10},
    "warmup_cosine_decay": {"peak_value": 3e-3, "end_value": 1e-5, "warmup_steps": 5},
    "big_vision_rsqrt": {"peak_value": 1e-3, "timescale": 20, "warmup_steps": 10, "cooldown_steps": 15},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_against_reference(name, conformance):
    expected = np.load(conformance / "units" / "schedules.npz")[name]
    schedule = create_schedule(schedule=name, total_steps=100, **CONFIGS[name])
    np.testing.assert_allclose([schedule(step) for step in range(101)], expected, rtol=2e-5, atol=1e-9)


def test_without_warmup_starts_at_the_peak():
    for name in ("warmup_linear_decay", "warmup_cosine_decay"):
        schedule = create_schedule(name, 10, peak_value=1.0)
        assert [schedule(0), schedule(5), schedule(10), schedule(99)] == pytest.approx([1.0, 0.5, 0.0, 0.0])


def test_decay_steps_replaces_total_steps():
    assert create_schedule("warmup_linear_decay", 100, peak_value=1.0, decay_steps=10)(10) == 0.0


def test_rsqrt_is_continuous_into_the_cooldown_and_goes_on_without_one():
    schedule = create_schedule("big_vision_rsqrt", 20, peak_value=1.0, timescale=4, cooldown_steps=4)
    at_start = 1.0 / np.sqrt(1 + 16 / 4)  # cool-down starts at 20 - 4
    assert [schedule(16), schedule(18), schedule(20), schedule(30)] == pytest.approx([at_start, at_start / 2, 0, 0])
    assert create_schedule("big_vision_rsqrt", 20, peak_value=1.0, timescale=4)(60) == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": "warmup_cosine"}, "did you mean 'warmup_cosine_decay'"),
        ({"schedule": "constant"}, "needs value"),
        ({"schedule": "constant", "value": 0.1, "warmup_steps": 3}, "unknown option 'warmup_steps'"),
        ({"schedule": "warmup_linear_decay", "peak_val": 0.1}, "did you mean 'peak_value'"),
        ({"schedule": "warmup_linear_decay", "peak_value": "0.1"}, "must be a number >= 0, got '0.1'"),
        ({"schedule": "warmup_linear_decay", "peak_value": 0.1, "warmup_steps": 10}, "got 10 of 10 steps"),
        ({"schedule": "big_vision_rsqrt", "peak_value": 0.1, "timescale": 0}, "timescale must be > 0"),
    ],
)
def test_mistakes_are_one_clear_error(options, message):
    with pytest.raises(ValueError, match=message):
        create_schedule(total_steps=10, **options)


def test_rate_schedule_takes_a_number_or_options():
    assert rate_schedule(0.5, 10)(3) == 0.5
    assert rate_schedule({"schedule": "constant", "value": 0.25}, 10)(3) == 0.25
    with pytest.raises(ValueError, match="needs the name of a schedule"):
        rate_schedule({"value": 0.25}, 10)
