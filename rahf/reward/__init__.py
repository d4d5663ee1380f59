"""Paper B's reward model: the probability that people find an image to show its prompt.

    reward = rahf.reward.load("path/to/workdir")
    rewards = reward(images, prompts)       # uint8[B, H, W, 3], B texts -> float32[B] in [0, 1]
"""


def load(workdir, clip=None):
    """Loads the trained reward model of a workdir; see `rahf.reward.predict.load`."""
    from rahf.reward import predict

    return predict.load(workdir, clip)
