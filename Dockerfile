# One image a service: docker build --build-arg SERVICE=users -t tenfold/users .
FROM python:3.13-slim AS base
ENV PYTHONUNBUFFERED=1 PYTHONFAULTHANDLER=1

FROM base AS dependencies
COPY requirements.lock .
# Nothing is compiled, so there is no compiler: pyvips is published as source only, but is Python alone (its library is
# the wheel pyvips-binary). Every service shares this layer.
RUN python -m venv /opt/tenfold \
 && /opt/tenfold/bin/python -m pip install --quiet --disable-pip-version-check --no-cache-dir \
      --require-hashes --no-deps --only-binary=:all: --no-binary=pyvips --no-compile -r requirements.lock \
 && /opt/tenfold/bin/python -m pip uninstall --quiet --yes pip \
 && /opt/tenfold/bin/python -m compileall -q -j 0 /opt/tenfold/lib

FROM base AS application
ARG SERVICE
WORKDIR /app
COPY shared shared
COPY services services
# Only this service and what it stands on; services import nothing from one another.
RUN test -f "services/$SERVICE/__main__.py" || { echo "SERVICE=$SERVICE: no such service" >&2; exit 1; } \
 && find services -mindepth 1 -maxdepth 1 -type d ! -name "$SERVICE" -exec rm -r {} + \
 && rm -f services/__main__.py \
 && python -m compileall -q shared services

FROM base
ARG SERVICE
LABEL org.opencontainers.image.title="tenfold-${SERVICE}" org.opencontainers.image.licenses="Apache-2.0"
RUN groupadd --gid 10001 tenfold && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /nonexistent tenfold \
 && install -d -o 10001 -g 10001 /var/lib/tenfold
ENV PATH=/opt/tenfold/bin:$PATH PYTHONDONTWRITEBYTECODE=1 SERVICE=${SERVICE} HOST=0.0.0.0 PORT=8000 ADMIN_PORT=9000
COPY --from=dependencies /opt/tenfold /opt/tenfold
COPY --from=application /app /app
WORKDIR /app
USER 10001:10001
EXPOSE 8000 9000
# The start period covers a worker whose predecessor died: its group waits for the old session (45 s) to end.
HEALTHCHECK --interval=5s --timeout=3s --start-period=90s --retries=3 \
  CMD ["python", "-c", "import os, urllib.request; urllib.request.urlopen(f\"http://127.0.0.1:{os.environ['ADMIN_PORT']}/health/ready\", timeout=2)"]
# exec makes python process 1, so that it gets SIGTERM itself and stops gracefully.
ENTRYPOINT ["/bin/sh", "-c", "exec python -m services.\"$SERVICE\" \"$@\"", "tenfold"]
CMD ["api"]
