"""What must work where TensorFlow cannot be imported."""

import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parent.parent
BLOCK = """
import sys
for name in ("tensorflow", "seqio", "tensorflow_datasets", "tensorflow_text"):
    sys.modules[name] = None  # importing it raises ImportError
"""
EVERYTHING = """
import cv2, rahf
from rahf import experiments
from rahf import evaluate, predict, train
from rahf.diffusion import sample
from rahf.reward import train as reward_train
from richhf_data import consolidate, metrics, synthetic

config = experiments.load("rahf_ci")
config.data.source = "stream"
results = train.train(config, "run")
assert results["num_examples"] == 8, results
assert evaluate.evaluate(config, "run", "test", 8)["num_examples"] == 8
example = synthetic.draw(0, 0, "test", 64, 64)
cv2.imwrite("a.png", example.image[..., ::-1])
model = rahf.load("run")
items = predict.predict_items(model, [{"name": "a", "image": predict.read_image("a.png"), "prompt": example.prompt}], 1)
predict.write("out", items, 1, predict.evaluation_tables("run", "test"))
"""


def test_stream_training_evaluation_and_prediction_need_no_tensorflow(tmp_path):
    path = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
    subprocess.run([sys.executable, "-c", BLOCK + path + EVERYTHING], cwd=tmp_path, check=True)
    page = (tmp_path / "out" / "report.html").read_text()
    assert all(row in page for row in ("this model", "constant predictor", "ceiling", "one annotator"))
    assert (tmp_path / "run" / "eval" / "test.json").is_file()


def test_import_rahf_takes_under_2_seconds():
    code = "import time; start = time.monotonic(); import rahf; assert time.monotonic() - start < 2"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
