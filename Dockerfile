# An image with skillmerge. For CPUs:
#
#   docker build -t skillmerge .
#
# For NVIDIA GPUs:
#
#   docker build -t skillmerge:cuda --build-arg BASE=nvidia/cuda:13.0.1-base-ubuntu24.04 --build-arg TORCH_INDEX= .
#
# Run it in the current folder, with `--gpus all` for a GPU:
#
#   docker run --rm --user "$(id -u):$(id -g)" -v "$PWD:/models" skillmerge plan recipe.yaml
ARG BASE=ubuntu:24.04
FROM ${BASE}

# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*

ENV PATH="/opt/venv/bin:$PATH"
WORKDIR /opt/skillmerge
COPY constraints.txt ./

# An empty TORCH_INDEX means the wheels of the default index, which bring CUDA.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN python3 -m venv /opt/venv \
    && pip install --no-cache-dir -c constraints.txt ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch

COPY LICENSE README.md pyproject.toml ./
COPY recipes ./recipes
COPY skillmerge ./skillmerge
RUN pip install --no-cache-dir -c constraints.txt '.[transformers,zstd]'

USER 1000
WORKDIR /models
ENTRYPOINT ["skillmerge"]
CMD ["--help"]
