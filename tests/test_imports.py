"""What must import where TensorFlow cannot be imported, and how fast; test_wheel.py runs the commands."""

import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parent.parent
NEED_TENSORFLOW = {
    "rahf.features",
    "rahf.t5x",  # and T5X
    "richhf_data.builder",
    "richhf_data.preprocessors",
    "richhf_data.records",
    "richhf_data.tasks",
    "richhf_data.tensorflow_cpu",
}
IMPORT_ALL = f"""
import importlib, pkgutil, sys
for name in ("tensorflow", "seqio", "tensorflow_datasets", "tensorflow_text"):
    sys.modules[name] = None  # importing it raises ModuleNotFoundError
import rahf, richhf_data
from richhf_data.errors import UserError

for package in (rahf, richhf_data):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        try:
            importlib.import_module(module.name)
        except UserError:
            assert module.name in {NEED_TENSORFLOW}, module.name
"""


def test_only_what_reads_and_writes_records_imports_tensorflow():
    done = subprocess.run([sys.executable, "-c", IMPORT_ALL], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_build_of_real_data_loads_no_synthetic_data_and_leaves_opencv_its_threads():
    code = """
import sys
import cv2
threads = cv2.getNumThreads()
import richhf_data.build, richhf_data.builder, richhf_data.scan
assert not [name for name in sys.modules if name.startswith("richhf_data.synthetic")]
assert cv2.getNumThreads() == threads
"""
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_import_rahf_takes_under_2_seconds():
    code = "import time; start = time.monotonic(); import rahf; assert time.monotonic() - start < 2"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
