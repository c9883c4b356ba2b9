# The inference service. By default with the CUDA build of torch; for a machine without a GPU, the CPU build
# is a tenth of the size:
#   docker build -f deploy/inference.Dockerfile \
#     --build-arg PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu .
FROM python:3.11-slim-bookworm AS install
RUN apt-get update && apt-get install --yes --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
WORKDIR /source
COPY pyproject.toml hatch_build.py README.md LICENSE ./
COPY builder_service builder_service
COPY inference_service inference_service
COPY loramux loramux
COPY extensions extensions
COPY shared shared
ARG PIP_EXTRA_INDEX_URL
# For the nodes of a Ray cluster: --build-arg MORE='ray[serve]>=2.60,<2.61'
ARG MORE
RUN python -m venv /opt/loramux && /opt/loramux/bin/pip install --no-cache-dir '.[inference,gcs,azure,otel,signing]' \
    ${MORE:+"$MORE"}
# The wheel brings the operations of CPUs, compiled for every processor that may run the image, which has no C++ compiler
# itself. This fails where it could not; not in /source, where the sources would be imported.
RUN cd / && /opt/loramux/bin/python -m inference_service.engine.kernels.cpu.build

FROM python:3.11-slim-bookworm
# Triton compiles its launchers on the machine that runs them.
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
COPY --from=install /opt/loramux /opt/loramux
# Volumes mounted here take over the owner.
RUN useradd --uid 10001 --create-home loramux && install --directory --owner=loramux /var/cache/loramux
ENV PATH=/opt/loramux/bin:$PATH PYTHONUNBUFFERED=1 TRITON_CACHE_DIR=/var/cache/loramux/triton
USER 10001
EXPOSE 50052
EXPOSE 8000
CMD ["python", "-m", "inference_service"]
