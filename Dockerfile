# What installs and plans is left behind: the last stage has the program, and the models that MODELS names with their
# plans. pip's configuration, for an index of one's own, comes as the secret "pip" and stays out of every layer.
ARG BASE_IMAGE=python:3.12-slim

FROM ${BASE_IMAGE} AS build
ARG VARIANT=cpu
WORKDIR /build
COPY constraints-${VARIANT}.txt ./
# Every wheel is checked against its hash; nothing else is there to be installed from.
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    python3 -m venv tools && python3 -m venv --without-pip /opt/kiln \
    && tools/bin/pip download --no-cache-dir --require-hashes --only-binary :all: --dest wheels \
       -r constraints-${VARIANT}.txt
ARG EXTRAS=
COPY pyproject.toml README.md ./
COPY service service
# TensorFlow's headers are for those who compile operations: a fifth of what it takes.
RUN extras=$(echo "$VARIANT $EXTRAS" | tr ' ' ',' | sed 's/^cpu,*//; s/,*$//') \
    && tools/bin/pip --python /opt/kiln/bin/python install --no-cache-dir --no-index --find-links wheels \
       ".${extras:+[$extras]}" \
    && rm -r /opt/kiln/lib/python3*/site-packages/tensorflow/include

FROM build AS baked
COPY . /context
ARG MODELS=
# Plans hold for the processor and the number of cores that they were measured on, and for the same settings.
RUN mkdir /models /opt/warm \
    && if [ -n "$MODELS" ]; then \
         cp -r "/context/$MODELS/." /models && KILN_CACHE_DIR=/opt/warm /opt/kiln/bin/kiln plan /models; \
       fi \
    && chmod -R a+rX /models /opt/warm

FROM ${BASE_IMAGE}
ARG BASE_IMAGE
ARG VARIANT=cpu
ARG VERSION=0.1.0
ARG REVISION=
ARG CREATED=
LABEL org.opencontainers.image.title="Kiln" \
      org.opencontainers.image.description="Serves trained Keras models over REST and gRPC (${VARIANT})" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.created="${CREATED}" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.base.name="${BASE_IMAGE}"
# Of group 0, so that the cache can be written under whatever number a cluster gives the process.
RUN useradd --uid 10001 --gid 0 --home-dir /tmp --no-create-home --shell /usr/sbin/nologin kiln \
    && install -d -o kiln -g 0 -m 775 /var/cache/kiln
COPY --from=build /opt/kiln /opt/kiln
COPY --from=baked /models /models
COPY --from=baked /opt/warm /opt/warm
ENV PATH=/opt/kiln/bin:$PATH HOME=/tmp PYTHONUNBUFFERED=1 \
    KILN_MODELS=/models KILN_CACHE_DIR=/var/cache/kiln KILN_WARM_CACHE_DIR=/opt/warm
USER 10001
WORKDIR /tmp
EXPOSE 8500 8501
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s CMD ["python", "-ISc", "import os, urllib.request as r; r.urlopen('http://127.0.0.1:' + os.environ.get('KILN_REST_PORT', '8501') + '/v2/health/ready', timeout=3)"]
ENTRYPOINT ["kiln"]
CMD ["serve"]
