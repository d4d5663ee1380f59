"""TensorFlow and what is built on it, for the data pipeline: quiet, and off the accelerators, which belong to JAX.

Import them from here, `from richhf_data.tensorflow_cpu import seqio, tf, tfds`: the first import decides.
"""

import contextlib
import os
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


@contextlib.contextmanager
def _quiet():
    """TensorFlow's start-up notes pass by its own log level, straight to the error stream: that is closed meanwhile."""
    sys.stderr.flush()
    kept, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(null)


with _quiet():
    import seqio
    import tensorflow as tf
    import tensorflow_datasets as tfds
    import tensorflow_text  # noqa: F401 - registers the tokeniser's ops

    with contextlib.suppress(RuntimeError):  # of a caller who has started TensorFlow already, and chosen its devices
        tf.config.set_visible_devices([], "GPU")

__all__ = ["seqio", "tf", "tfds"]
