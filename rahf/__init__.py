"""RAHF: rich human feedback for text-to-image generation, in JAX.

    model = rahf.load("path/to/workdir")
    feedback = model.predict(images, prompts)
"""


def load(workdir):
    """The trained model of a workdir; see `rahf.predict.load`."""
    from rahf import predict

    return predict.load(workdir)
