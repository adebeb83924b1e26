# The trainer's image: what Cloud Run, Vertex AI and `make image-test` run.
#
#   docker build --tag g4trainer .
#   docker run --rm --network none --read-only --tmpfs /tmp g4trainer selftest
#
# Layers, from what changes least to what changes most: compiler, packages, our code.

# python:3.11.17-slim-bookworm; both stages must be the same Python, since one makes the other's packages.
ARG PYTHON=python:3.11.17-slim-bookworm@sha256:2333bd330d12de02514770b3585cad313644316047cdee24a7acfdece6de6efb

# ---- packages ----------------------------------------------------------------------------------------------------
FROM ${PYTHON} AS packages

# locked: exactly the files of the lock, by hash, with CUDA. local: the lock's versions without hashes and without CUDA,
# for a machine whose package index has a CPU build of torch.
ARG TORCH=locked

COPY requirements-train.lock /build/
WORKDIR /build
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
RUN --mount=type=cache,target=/root/.cache/pip \
    python -m venv /opt/venv; \
    if [ "${TORCH}" = locked ]; then \
        /opt/venv/bin/pip install --no-deps --require-hashes --requirement requirements-train.lock; \
    else \
        grep -oE '^[A-Za-z0-9._-]+==[^ ]+' requirements-train.lock | grep -vE '^(cuda|nvidia|triton)[-=]' > local.txt; \
        /opt/venv/bin/pip install --no-deps --requirement local.txt; \
    fi; \
    /opt/venv/bin/pip check; \
    /opt/venv/bin/pip uninstall --yes pip

# ---- image -------------------------------------------------------------------------------------------------------
FROM ${PYTHON}

# Triton compiles its launchers when a model is first compiled: a C compiler, its headers, and Python's (in the base).
# hadolint ignore=DL3008 # Debian drops old versions from its mirrors, so a pinned one stops building
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 10001 g4kit \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin g4kit

COPY --from=packages /opt/venv /opt/venv

# Nothing but /tmp and the mounted bucket is written: caches of compiled kernels and fonts go there. Cloud Run puts the
# NVIDIA driver into /usr/local/nvidia.
ENV PATH=/opt/venv/bin:$PATH \
    LD_LIBRARY_PATH=/usr/local/nvidia/lib64 \
    PYTHONPATH=/opt/g4kit \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HOME=/tmp \
    HF_HOME=/tmp/huggingface \
    MPLCONFIGDIR=/tmp/matplotlib

WORKDIR /opt/g4kit
COPY recipes recipes
COPY trainer/g4trainer g4trainer
RUN python -m compileall -q g4trainer

ARG REVISION=unknown
ARG VERSION=unknown
LABEL org.opencontainers.image.title="g4trainer" \
      org.opencontainers.image.description="Fine-tunes Gemma 4 with QLoRA in a run directory" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.source="https://github.com/g4kit/g4kit" \
      org.opencontainers.image.base.name="docker.io/library/python:3.11.17-slim-bookworm" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.version="${VERSION}"

# By number, since the bucket's mount is given to the same numbers (terraform/job.tf).
USER 10001:10001
ENTRYPOINT ["python", "-m", "g4trainer"]
CMD ["selftest"]
