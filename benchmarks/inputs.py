"""Synthetic embeddings to measure on, of any size; those of a stored run's member are `leadline.layers`'."""

import numpy as np

from leadline.knn.arrays import Array


class DeepLayer:
    """Rows like those of a deep layer: wide, but of few intrinsic dimensions, in clusters, one for each class.

    A point is drawn in a latent space of `latent` dimensions, from a Gaussian of unit variance around its class's
    centre, and goes through a fixed random map of two ReLU layers to `width` values. The map is continuous and
    piecewise linear, so the rows lie on a sheet of `latent` dimensions: the distance to the k-th neighbour shrinks with
    the number of points as it does in that space. Noise of NOISE a value keeps them from lying on it exactly.
    """

    CLASSES = 10
    SPREAD = 3.0  # standard deviation of the centres, beside 1 within a class: some classes overlap
    NOISE = 1e-3  # beside values of about 1

    def __init__(self, latent: int, width: int) -> None:
        random = np.random.default_rng(0)
        self.centres = self.SPREAD * random.standard_normal((self.CLASSES, latent), np.float32)
        self._first = random.standard_normal((latent, width), np.float32) * np.float32(latent**-0.5)
        self._second = random.standard_normal((width, width), np.float32) * np.float32((2 / width) ** 0.5)
        self._biases = random.standard_normal((2, width), np.float32)

    def draw(self, n: int, seed: int) -> tuple[Array, Array]:
        """Rows float32 [n, width] and classes int64 [n], the same for the same seed."""
        random = np.random.default_rng([1, seed])
        classes = random.integers(0, self.CLASSES, n)
        latent = self.centres[classes] + random.standard_normal((n, self.centres.shape[1]), np.float32)
        rows = np.maximum(latent @ self._first + self._biases[0], 0) @ self._second + self._biases[1]
        np.maximum(rows, 0, out=rows)
        rows += np.float32(self.NOISE) * random.standard_normal(rows.shape, np.float32)
        return rows, classes
