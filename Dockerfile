# An image with the `ganscale` command; runs/ and data/ come from outside:
#   docker build -t ganscale .
#   docker run --gpus all --user "$(id -u):$(id -g)" \
#     -v "$PWD/data:/ganscale/data" -v "$PWD/runs:/ganscale/runs" ganscale train configs/demo.yaml
# Under SLURM, by Apptainer or Pyxis: docs/cluster.md.
# torch's wheel brings the CUDA libraries: the base only tells the container runtime about the GPUs
# and lets drivers older than CUDA 13 serve it. Without GPUs: --build-arg BASE=debian:bookworm
ARG BASE=nvidia/cuda:13.0.1-base-ubuntu24.04

FROM ${BASE} AS python
# hadolint ignore=DL3008  # a distribution keeps one Python for its lifetime
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates python3 \
    && apt-get clean \
    && rm -rf /var/lib/apt/lists/*

FROM python AS build
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3-venv \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /source
COPY . .
RUN python3 -m venv /opt/ganscale \
    && /opt/ganscale/bin/pip install --no-cache-dir -c constraints.txt '.[evaluation]'

FROM python
COPY --from=build /opt/ganscale /opt/ganscale
ENV PATH=/opt/ganscale/bin:$PATH
# Whoever runs it (--user) has a home for copies of remote shards and for W&B.
RUN useradd --uid 10001 --create-home --home-dir /ganscale ganscale && mkdir -m 1777 /home/anyone
ENV HOME=/home/anyone
USER 10001:10001
WORKDIR /ganscale
COPY configs configs
COPY launch launch
ENTRYPOINT ["ganscale"]
