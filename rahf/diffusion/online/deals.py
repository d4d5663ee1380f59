"""The random order of what is dealt to batches."""

import numpy as np

PROMPTS, PICTURES, STEPS = range(3)  # what is dealt


def dealt(seed: int, texts: int, first: int, count: int) -> np.ndarray:
    """Places `first` to `first + count` of an endless order of texts, int64[count]. Each epoch has every text once."""
    places, found = np.arange(first, first + count), []
    for epoch in np.unique(places // texts):
        order = np.random.default_rng((seed, PROMPTS, epoch)).permutation(texts)
        found.append(order[places[places // texts == epoch] % texts])
    return np.concatenate(found)
