# A node in a container: `docker build -t divault .`, or `docker-compose up --build` with a .env beside it.
# It holds what scikit-learn models need; docs/how-to/run-a-node.md adds PyTorch and Transformers.

FROM python:3.11-slim-bookworm AS build
WORKDIR /build
RUN python -m venv /opt/divault
COPY requirements.txt ./
COPY requirements/build.txt requirements/
RUN /opt/divault/bin/pip install --no-deps --require-hashes --only-binary=:all: -r requirements.txt -r requirements/build.txt
COPY pyproject.toml README.md LICENSE ./
COPY src src
RUN /opt/divault/bin/pip install --no-deps --no-build-isolation .

FROM python:3.11-slim-bookworm
RUN useradd --uid 10001 --no-create-home --shell /usr/sbin/nologin divault
WORKDIR /app
RUN mkdir cache logs state && chown divault:divault cache logs state && chmod 700 state
COPY --from=build /opt/divault /opt/divault
ENV PATH=/opt/divault/bin:/usr/local/bin:/usr/bin:/bin HOST=0.0.0.0 PORT=8000 PYTHONUNBUFFERED=1
USER divault
VOLUME ["/app/cache", "/app/logs", "/app/state"]
EXPOSE 8000
HEALTHCHECK --interval=15s --timeout=10s --start-period=30s --retries=3 \
  CMD python -c "import os, urllib.request as u; u.urlopen('http://127.0.0.1:' + os.environ['PORT'] + '/health', timeout=8)"
CMD ["divault", "serve"]
