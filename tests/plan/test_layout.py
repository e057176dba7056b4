"""Layouts, sizes in words, and what is sent between devices."""

import pytest

import visionmoe as vm
from visionmoe.distributed.layout import Layout
from visionmoe.plan.estimate import layouts, plan
from visionmoe.plan.memory import memory
from visionmoe.plan.optimizer import Share, held
from visionmoe.plan.sizes import in_words, parse_bytes
from visionmoe.plan.traffic import traffic
from visionmoe.plan.work import Rates, Work

CONFIG = vm.ModelConfig(
    image_size=32, patch_size=8, num_classes=10, hidden_size=32, num_layers=2, mlp_dim=64, num_heads=2
).replace(num_experts=4, num_selected_experts=1, layers=(1,), capacity_factor=1.0)
RATES = Rates(flops=1e12, bandwidth=1e11, link=1e10)


def test_layouts_are_the_factorisations_that_the_experts_allow():
    names = [str(layout) for layout in layouts(CONFIG, 8)]
    # ep of 1, 2, 4 divides 4 experts, 8 does not; the rest is dealt out to dp and fsdp: 4 + 3 + 2 ways
    assert len(names) == len(set(names)) == 9
    assert "dp=2,fsdp=1,ep=4" in names and "dp=1,fsdp=1,ep=8" not in names
    dense = CONFIG.replace(layers=())
    assert {layout.ep for layout in layouts(dense, 8)} == {1}
    # FSDP cuts into thirds what it has, if not evenly; but beside ep experts of width 64 and 32 are not
    assert [str(layout) for layout in layouts(CONFIG, 3)] == ["dp=3,fsdp=1,ep=1", "dp=1,fsdp=3,ep=1"]
    assert "dp=1,fsdp=3,ep=2" not in [str(layout) for layout in layouts(CONFIG, 6)]


def test_soft_moe_can_have_its_experts_split():
    soft = CONFIG.replace(router="soft", capacity_multiple_of=None, noise_std=0.0)
    assert {layout.ep for layout in layouts(soft, 4)} == {1, 2, 4}
    assert memory(Work(soft, 16), Layout(ep=4)).parameters < memory(Work(soft, 16), Layout(dp=4)).parameters


def test_the_largest_part_of_a_parameter():
    # ten rows over four devices are three, three, three and one
    assert Share((10, 7), expert=False).values(Layout(fsdp=4)) == 3 * 7
    assert Share((10, 7), expert=False).values(Layout(fsdp=2, ep=2)) == 3 * 7
    assert Share((10, 7), expert=False).values(Layout(dp=2, ep=2)) == 70
    assert Share((), expert=False).values(Layout(fsdp=4)) == 1
    # without ep FSDP cuts between the experts: four over eight devices are one each for half of them
    assert Share((4, 64, 32), expert=True).values(Layout(fsdp=8)) == 64 * 32
    # beside ep it cuts the experts' rows, which is always even
    assert Share((4, 64, 32), expert=True).values(Layout(fsdp=2, ep=4)) == 64 * 32 // 2


def test_sizes_in_words():
    assert parse_bytes("80GB") == 80 * 10**9 and parse_bytes("1.5 GiB") == 3 * 2**29
    assert parse_bytes("500mb") == 5 * 10**8 and parse_bytes("1000B") == 1000
    for wrong in ("80 gigs", "80", "GB", "-1GB", "0GB", ""):
        with pytest.raises(ValueError, match="a size must be like 80GB"):
            parse_bytes(wrong)


def test_sizes_to_words():
    assert [in_words(size) for size in (0, 999, 1000, 1_250_000, 999_999_999, 51.24e9, 14_700e9)] == [
        "0 B", "999 B", "1 kB", "1.25 MB", "1 GB", "51.2 GB", "14.7 TB",
    ]  # fmt: skip


def test_layouts_in_words():
    assert Layout.parse("ep=4, dp=2", 8) == Layout.parse("ep=4", 8) == Layout(dp=2, ep=4)
    assert Layout.parse("dp=2,ep=3").size == 6 and str(Layout(2, 1, 3)) == "dp=2,fsdp=1,ep=3"
    for wrong, message in (
        ("tp=2", "must be like"),
        ("dp=x", "must be like"),
        ("dp=2,dp=2", "must be like"),
        ("dp=2", r"'dp=2' is for 2 processes, but the job has 4: here is the hint"),
        ("dp=0", "dp must be >= 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            Layout.parse(wrong, 4, "here is the hint")


def test_what_is_sent():
    work = Work(CONFIG, 16)
    sizes = held(work)
    assert traffic(work, Layout(), sizes).total == 0
    # a ring all-reduce of n devices sends 2 (n - 1) / n of the gradients
    assert traffic(work, Layout(dp=4), sizes).gradients == round(2 * 4 * sizes.dense * 3 / 4) + round(
        2 * 4 * sizes.experts * 3 / 4
    )
    sharded = traffic(work, Layout(fsdp=4), sizes)
    whole = 4 * sizes.parameters * 3 // 4
    assert sharded.gradients == 0 and sharded.gather == pytest.approx(2 * whole, abs=4)
    assert sharded.scatter == pytest.approx(whole, abs=4)
    # ep=4: 4 images of 17 tokens a device make 68 requests: 17 places for each of 4 experts, 20 in multiples of 4
    experts = traffic(work, Layout(ep=4), sizes)
    assert experts.tokens == 4 * (4 * 4 * 20 * 32) * 3 // 4  # four ways, float32, three quarters go elsewhere
    assert experts.gradients == round(2 * 4 * sizes.dense * 3 / 4)  # every expert is on one device alone
    assert experts.gather == experts.scatter == 0


def test_shards_take_their_share():
    work = Work(CONFIG, 16)
    sizes = held(work)
    # a quarter of all; but of one row, as positions (17, 32) and class token (32,) are, one device has all, and of the
    # head's ten rows (32,) and values three
    uneven = (17 * 32 + 32) * 3 / 4 + (3 - 2.5) * 32 + (3 - 2.5)
    whole = sizes.dense / 4 + uneven + sizes.experts // 4
    assert memory(work, Layout(fsdp=2, ep=2)).parameters == 4 * whole
    assert memory(work, Layout(dp=2, ep=2)).parameters == 4 * (sizes.dense + sizes.experts // 2)


def test_what_is_recommended_fits_and_is_the_quickest():
    work = Work(CONFIG, 16, gpu=True)
    found = plan(work, 4, 10**9, RATES)
    assert found.recommended is not None and found.recommended.fits
    assert found.recommended.seconds.total == min(one.seconds.total for one in found.candidates)
    # two layouts, one of which has room
    peaks = sorted(one.memory.peak for one in found.candidates)
    tight = plan(work, 4, peaks[0], RATES)
    assert tight.recommended is not None and tight.recommended.memory.peak == peaks[0]


def test_where_nothing_fits_the_fewest_devices_are_found():
    work = Work(CONFIG, 16, gpu=True)
    alone = plan(work, 1, 10**9, RATES).candidates[0].memory.peak
    found = plan(work, 1, alone - 1, RATES)
    assert found.recommended is None and found.fewest is not None
    devices, layout = found.fewest
    assert devices > 1 and layout.size == devices and memory(work, layout).peak < alone
    for fewer in range(2, devices):  # none of them would do
        if 16 % fewer == 0:
            assert all(memory(work, one).peak >= alone for one in layouts(CONFIG, fewer))
    assert plan(work, 1, 1000, RATES).fewest is None


def test_on_a_cpu_the_whole_process_must_fit():
    work = Work(CONFIG, 16)
    one = plan(work, 1, 10**9, RATES).candidates[0]
    assert one.process is not None and one.process.tensors == one.memory.peak
    passing = one.memory.peak - one.memory.parameters - one.memory.optimizer
    assert one.process.holes == pytest.approx(0.3 * passing, abs=1)
    assert one.process.total == one.needed > one.memory.peak + 700e6  # torch itself is large
    assert not plan(work, 1, one.needed - 1, RATES).candidates[0].fits
    assert plan(work, 1, one.needed, RATES).candidates[0].fits
    on_gpu = plan(Work(CONFIG, 16, gpu=True), 1, 10**9, RATES).candidates[0]
    assert on_gpu.process is None and on_gpu.needed == on_gpu.memory.peak


def test_gradients_of_several_devices():
    alone, sizes = memory(Work(CONFIG, 4), Layout()), held(Work(CONFIG, 4))
    # DDP holds whole gradients in its buckets from the first moment of a step on; experts' are their owners'
    copies = memory(Work(CONFIG, 16), Layout(dp=4))
    assert copies.at_peak["gradients"] == 4 * sizes.parameters >= alone.at_peak["gradients"]
    split = memory(Work(CONFIG, 16), Layout(ep=4))
    assert 4 * sizes.dense <= split.at_peak["gradients"] <= 4 * (sizes.dense + sizes.experts // 4)
    # FSDP keeps them whole until the last part of an accumulated batch
    parts = memory(Work(CONFIG, 16, accumulation=2), Layout(fsdp=4))
    assert parts.at_peak["gradients"] == 4 * sizes.parameters > memory(Work(CONFIG, 16), Layout(fsdp=4)).gradients


def test_time_is_the_longer_of_products_and_memory_plus_the_links():
    work = Work(CONFIG, 16)
    one = plan(work, 4, 10**9, RATES, Layout(ep=4)).candidates[0]
    assert one.seconds.total == max(one.flops / 1e12, one.moved / 1e11) + one.traffic.total / 1e10


def test_a_batch_must_be_divisible():
    with pytest.raises(ValueError, match=r"multiple of devices x accumulation, got 10 and 4 x 1"):
        plan(Work(CONFIG, 10), 4, 10**9, RATES)
