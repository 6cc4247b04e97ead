"""What several rooms' tests share."""

import pytest
from tiny import TINY


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory):
    """A finished run of digits, to be read and not changed."""
    import leadline

    return leadline.run(TINY, tmp_path_factory.mktemp("runs") / "tiny")


@pytest.fixture(scope="session")
def until_decided_run(tmp_path_factory):
    """The same with `votes: until-decided`."""
    import leadline

    return leadline.run({**TINY, "votes": "until-decided"}, tmp_path_factory.mktemp("runs") / "until-decided")
