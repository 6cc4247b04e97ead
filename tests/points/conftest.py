from collections.abc import Callable
from typing import Any

import pytest

from leadline.errors import LeadlineError


@pytest.fixture
def refused() -> Callable[..., str]:
    """Call something that must end in a LeadlineError of one line which holds all the words."""

    def check(call: Callable[[], Any], *words: object) -> str:
        with pytest.raises(LeadlineError) as caught:
            call()
        message = str(caught.value)
        assert len(message.splitlines()) == 1
        for word in words:
            assert str(word) in message, message
        return message

    return check
