"""Numbers that are no image, as pictures."""

import numpy as np
import pytest

from leadline.report.pictures import BARS, TALL, bars


@pytest.mark.parametrize("width", [1, 3, 10, 100, 200, 5000])
def test_bars_rise_with_their_values(width):
    shown = np.asarray(bars(np.arange(width, dtype=np.float32).reshape(-1, 1) * 7 - 3))[..., 0]
    heights = (shown == 255).sum(axis=0)
    assert shown.shape[0] == TALL and BARS / 2 < shown.shape[1] <= BARS
    assert (np.diff(heights) >= 0).all() and heights[0] == 1  # the least value is seen as well
    assert width == 1 or heights[-1] == TALL
    assert (np.sort(shown, axis=0) == shown).all()  # from the bottom up


def test_values_that_are_all_the_same_are_bars_of_one_height():
    assert (np.asarray(bars(np.full(50, 7.0)))[..., 0] == 255).sum(axis=0).max() == 1
