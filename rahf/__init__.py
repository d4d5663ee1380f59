"""RAHF: rich human feedback for text-to-image generation, in JAX.

    model = rahf.load("path/to/workdir")
    feedback = model.predict(images, prompts)
"""


def load(workdir):
    """The trained model of a workdir or of hf://owner/name; see `rahf.predictor.load`."""
    from rahf import predictor

    return predictor.load(workdir)
