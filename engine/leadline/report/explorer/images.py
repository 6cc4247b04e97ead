"""Inputs of a run's points as PNG, read when they are asked for."""

from collections import OrderedDict
from functools import cached_property
from io import BytesIO
from threading import Lock

import numpy as np
from PIL import Image

from leadline.errors import LeadlineError
from leadline.knn.arrays import Array
from leadline.points import Points
from leadline.query import Run
from leadline.report.pictures import bars, picture, points_of

SIDES = {"small": 96, "large": 384}  # pixels that a picture has at most, of the gallery and of one point
KEPT = 4096  # pictures in memory: some 40 MB of small ones


class Images:
    """Pictures of a run's points; from its own configuration, without a download."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._lock = Lock()  # Points are read by one thread at a time
        self._pngs: OrderedDict[tuple[int, str], bytes] = OrderedDict()

    def refuse_missing(self) -> None:
        """Raises LeadlineError where the inputs are not at hand, or are not those that the run was made of."""
        with self._lock:
            if isinstance(self._opened, LeadlineError):
                raise self._opened

    def read(self, point_id: int) -> Array:
        """The input [1, ...] of one point. Raises LeadlineError as `refuse_missing`, and for a damaged one."""
        self.refuse_missing()
        assert isinstance(self._opened, Points)
        with self._lock:
            return self._opened.read(np.array([point_id]))

    def png(self, point_id: int, size: str) -> bytes:
        """The picture of one point, as large as the input or as SIDES has it. Raises LeadlineError as `read` does."""
        asked = (point_id, size)
        if (kept := self._pngs.get(asked)) is not None:
            return kept
        values = self.read(point_id)[0]
        image = picture(values) or bars(values)
        image.thumbnail((SIDES[size], SIDES[size]), Image.Resampling.BOX)
        file = BytesIO()
        image.save(file, format="PNG")
        with self._lock:
            self._pngs[asked] = file.getvalue()
            if len(self._pngs) > KEPT:
                self._pngs.popitem(last=False)
        return file.getvalue()

    @cached_property
    def _opened(self) -> Points | LeadlineError:
        """What opening the points gave, once: a folder of a million images is listed for some time."""
        try:
            return points_of(self._run, download=False)
        except LeadlineError as error:
            return error
