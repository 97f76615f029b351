"""Property tests of benchmarks/plan.py: the counts are counts."""
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import plan  # noqa: E402

TINY = dict(image_channels=1, channels=8, multipliers=(1,), blocks=1, attention_levels=(), heads=1,
            classes=None, patch=1)


def test_operations_and_memory_are_proportional_to_the_images():
    one, three = plan.count(8, TINY, rank=2), plan.count(8, TINY, rank=2, images=3)
    assert three["flops"] == 3 * one["flops"] > 0
    assert three["kept"] == 3 * one["kept"] > 0


def test_a_wider_image_costs_in_proportion_to_its_pixels_but_for_the_attention():
    """4 times the pixels: 4 times the operations of convolutions, 16 times the scores of the attention."""
    small, large = plan.count(8, TINY, rank=2)["flops"], plan.count(16, TINY, rank=2)["flops"]
    assert 4 * small < large + 3 * 3 * 2 * 16 * 8 * 4 and large < 16 * small


def test_hours_are_operations_over_operations_a_second():
    assert plan.hours(flops=int(plan.PEAK), draws=3600, gpus=1, share=1.0) == pytest.approx(1.0)
    alone = plan.hours(10**12, 10**6, 1, 0.2)
    assert plan.hours(10**12, 10**6, gpus=8, share=0.2) == pytest.approx(alone / 8)
