# RAHF in a container: a target for each accelerator. By default it serves the critic whose workdir is mounted on /model.
#
#   docker build --target=cpu -t rahf:cpu .
#   docker run --rm --publish=8080:8080 --volume="$PWD/run:/model:ro" rahf:cpu
#   docker run --rm rahf:cpu rahf.convert --help      # or another command
#
# docs/pods.md has more. launch/xm_launch.py adds a stage of its own to this file.

FROM python:3.11-slim AS base
ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN useradd --create-home --uid=1000 rahf
WORKDIR /rahf
COPY LICENSE README.md constraints.txt pyproject.toml setup.py ./
COPY configs/ configs/
COPY launch/ launch/
COPY rahf/ rahf/
COPY richhf_data/ richhf_data/
EXPOSE 8080
# It answers once all batch sizes are compiled, which takes minutes for a large model.
HEALTHCHECK --start-period=15m --interval=30s --timeout=10s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8080/health', timeout=9)"]
ENTRYPOINT ["python", "-m"]
CMD ["rahf.serve", "--workdir=/model", "--host=0.0.0.0", "--port=8080"]

FROM base AS tpu
RUN python -m pip install --no-cache-dir -c constraints.txt '.[serve,tpu]'
USER 1000

# JAX brings CUDA along: the host needs a driver and the NVIDIA container toolkit, and runs it with --gpus=all.
FROM base AS cuda
RUN python -m pip install --no-cache-dir -c constraints.txt '.[serve,cuda]'
USER 1000

FROM base AS cpu
RUN python -m pip install --no-cache-dir -c constraints.txt '.[serve]'
USER 1000
