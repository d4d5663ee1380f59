"""TensorFlow for the data pipeline: quiet, and off the accelerators, which belong to JAX.

Import it as `from richhf_data.tensorflow_cpu import tf`.
"""

import contextlib
import os
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


def _import_quietly():
    """TensorFlow's start-up notes pass by its own log level, straight to the error stream: that is closed meanwhile."""
    sys.stderr.flush()
    kept, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        import tensorflow

        return tensorflow
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(null)


tf = _import_quietly()
with contextlib.suppress(RuntimeError):  # of a caller who has started TensorFlow already, and chosen its devices
    tf.config.set_visible_devices([], "GPU")
