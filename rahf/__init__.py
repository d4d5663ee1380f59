"""RAHF: rich human feedback for text-to-image generation, in JAX.

    model = rahf.load("synth")                  # the critic that comes with the package; or a workdir, or an address
    feedback = model.predict(images, prompts)
"""


def load(workdir):
    """The trained model of a workdir, of hf://owner/name, or of a critic in the package; see `rahf.predictor.load`."""
    from rahf import predictor

    return predictor.load(workdir)
