"""A run in a bucket: training, resuming, evaluation and prediction, through gcsfs and TensorStore, against tests/gcs.py."""

import json
import os
import pathlib
import subprocess
import sys

import cv2
import gcs
import numpy as np
import quick_xla

ROOT = pathlib.Path(__file__).parent.parent


def test_a_run_lives_in_a_bucket(tmp_path):
    server = gcs.Server()
    environment = os.environ | {
        "STORAGE_EMULATOR_HOST": server.url,  # gcsfs
        "TENSORSTORE_GCS_HTTP_URL": server.url,
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
        "NO_GCE_CHECK": "true",
        "EPATH_USE_TF": "false",  # whose file system cannot be told another address
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
        "XLA_FLAGS": quick_xla.FLAGS,
    }

    cv2.imwrite(str(tmp_path / "a.png"), np.zeros((32, 32, 3), np.uint8))
    command = [sys.executable, "tests/gcs_worker.py", str(tmp_path / "a.png")]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "resumed from step 2" in result.stdout

    def content(name) -> bytes:
        return server.objects["bucket", f"run/{name}"][1]

    names = {name.removeprefix("run/") for _, name in server.objects}
    assert {"config.json", "vocabulary.model", "eval/test.json", "eval/test.md", "out/report.html"} <= names
    assert {"checkpoints/2/commit_success.txt", "checkpoints/4/commit_success.txt"} <= names
    assert not any("partial" in name for name in names)
    assert json.loads(content("eval/test.json"))["num_examples"] == 8
    assert json.loads(content("out/predictions.jsonl"))["prompt"] == "a red cat"
    events = [content(name) for name in names if name.startswith("tensorboard/")]
    assert len(events) == 2
    assert all(b"train/loss" in event and b"dev/score/plcc/plausibility" in event for event in events)
