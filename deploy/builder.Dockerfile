# The builder service and the loramux command, without torch.
# Build it from the root of the repository: docker build -f deploy/builder.Dockerfile .
FROM python:3.11-slim-bookworm AS install
WORKDIR /source
COPY pyproject.toml hatch_build.py README.md LICENSE ./
COPY builder_service builder_service
COPY inference_service inference_service
COPY loramux loramux
COPY extensions extensions
COPY shared shared
RUN python -m venv /opt/loramux && /opt/loramux/bin/pip install --no-cache-dir '.[builder,gcs,azure,otel,signing]'

FROM python:3.11-slim-bookworm
COPY --from=install /opt/loramux /opt/loramux
# The adapters of the demo, which no wheel has.
COPY examples /opt/loramux/lib/python3.11/site-packages/loramux/examples
# Volumes mounted here take over the owner.
RUN useradd --uid 10001 --create-home loramux && install --directory --owner=loramux /var/lib/loramux
ENV PATH=/opt/loramux/bin:$PATH PYTHONUNBUFFERED=1
USER 10001
EXPOSE 50051
CMD ["python", "-m", "builder_service"]
