"""TensorFlow, TFDS and seqio for the data pipeline, with no start-up messages and no accelerator, which JAX uses.

Import them from here: `from richhf_data.tensorflow_cpu import seqio, tf, tfds`. Extra `data` installs them.
"""

import contextlib
import os
import sys

from richhf_data.errors import UserError

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


@contextlib.contextmanager
def _start_up():
    """Imports without TensorFlow's messages, which ignore its log level and go straight to the error stream.

    Raises:
      UserError: a package is not installed.
    """
    sys.stderr.flush()
    kept, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    except ModuleNotFoundError as error:
        spec = sys.modules["__main__"].__spec__  # None but for `python -m NAME`
        command = spec.name.removesuffix(".__main__") + " with these flags" if spec else "this"
        raise UserError(
            f"{command} needs the package {error.name}, which is not installed; pip install 'rahf[data]' installs it"
        ) from error
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(null)


with _start_up():
    import tensorflow as tf
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import shuffle

    _feature_of_name = tfds.features.FeatureConnector.cls_from_name

    def _cls_from_name(name: str):
        if not str(name).startswith("tensorflow_datasets."):  # TFDS would import whatever module it names
            raise UserError(f"features.json: got a feature of class {name!r}, expected TFDS's own alone; it is not imported")
        return _feature_of_name(name)

    tfds.features.FeatureConnector.cls_from_name = staticmethod(_cls_from_name)
    shuffle.MAX_MEM_BUFFER_SIZE = 64 << 20  # bytes of examples that a build holds to shuffle them; 1000 MiB by default
    with contextlib.suppress(RuntimeError):  # the caller has started TensorFlow and chosen its devices
        tf.config.set_visible_devices([], "GPU")


def __getattr__(name):
    if name != "seqio":
        raise AttributeError(name)
    with _start_up():  # only where it is used: a build saves its 150 MiB
        import seqio
        import tensorflow_text  # noqa: F401 - registers the tokeniser's ops
    return seqio


__all__ = ["seqio", "tf", "tfds"]  # noqa: F822
