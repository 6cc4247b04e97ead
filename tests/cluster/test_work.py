"""Into what parts banks are cut."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import TINY

from leadline.cluster.common import CommonBank
from leadline.cluster.work import bank_parts, common_bank_parts
from leadline.config import load_config
from leadline.knn.exact import fits_memory
from leadline.members.probes import Probe


def of(k, memory, method="exact"):
    audit = {"depth_agreement": 0.9} if method == "auto" else {}
    return load_config({**TINY, "k": k, "method": method, "audit": audit, "engine": {"memory_budget": 4 * memory}})


@given(st.integers(1, 3000), st.integers(1, 400), st.integers(1, 60), st.integers(1, 1 << 20))
def test_parts_are_the_bank_and_as_few_as_fit_the_memory(n_bank, width, k, memory):
    probe = Probe(0, "input", width, None, (width,))
    parts = bank_parts(of(k, memory), n_bank, probe)
    assert [row for part in parts for row in range(*part)] == list(range(n_bank))
    largest = max(stop - first for first, stop in parts)
    if len(parts) > 1:
        assert min(stop - first for first, stop in parts) > k
        assert not fits_memory(-(-n_bank // (len(parts) - 1)), width, memory)
    # Or one more would leave too few rows in each.
    assert fits_memory(largest, width, memory) or n_bank // (len(parts) + 1) <= k
    common = CommonBank(np.arange(n_bank), k, True)
    assert common_bank_parts(of(10, memory), common, probe) == parts


@pytest.mark.parametrize(
    ("budget", "left"), [(4 << 30, 3136 << 20), (1280 << 20, 320 << 20), (1200 << 20, 300 << 20), (4 << 20, 1 << 20)]
)
def test_searching_has_what_the_libraries_leave_of_the_budget_or_a_fourth_of_it(budget, left):
    assert load_config({**TINY, "engine": {"memory_budget": budget}}).engine.search_memory == left


@pytest.mark.parametrize("method", ["flat", "auto"])
def test_indexes_are_not_cut_but_what_members_share_is(method):
    config, probe = of(10, 1000, method), Probe(0, "input", 8, None, (8,))
    assert bank_parts(config, 500, probe) == [(0, 500)]
    assert len(common_bank_parts(config, CommonBank(np.arange(500), 10, True), probe)) == 34  # of 15 rows at most
