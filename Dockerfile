# Two stages: the first installs exactly the packages of constraints.txt, the second has only the result.
ARG PYTHON_VERSION=3.12

FROM python:${PYTHON_VERSION}-slim AS build
WORKDIR /build
COPY constraints.txt pyproject.toml README.md ./
COPY service service
# Every wheel is checked against its hash; what only development needs is then left behind.
RUN python -m pip download --no-cache-dir --require-hashes --dest /wheels -r constraints.txt
RUN python -m venv /opt/kiln && /opt/kiln/bin/python -m pip install --no-cache-dir --no-index --find-links /wheels .

FROM python:${PYTHON_VERSION}-slim
RUN useradd --uid 10001 --create-home kiln && install -d -o kiln /models /var/cache/kiln
COPY --from=build /opt/kiln /opt/kiln
ENV PATH=/opt/kiln/bin:$PATH KILN_MODELS=/models KILN_CACHE_DIR=/var/cache/kiln PYTHONUNBUFFERED=1
USER 10001
EXPOSE 8500 8501
HEALTHCHECK --start-period=60s CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8501/v2/health/ready', timeout=2)"]
ENTRYPOINT ["kiln"]
CMD ["serve"]
