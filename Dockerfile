# syntax=docker/dockerfile:1
# One image for training, for the page with its API, and for the MLflow server. docs/guides/containers.md explains it.
#
#     docker build --tag gpt2-to-target:cpu .
#     docker build --tag gpt2-to-target:cuda --build-arg TORCH=cuda .
ARG PYTHON=3.13
FROM python:${PYTHON}-slim-trixie
ARG TORCH=cpu
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]

# torch.compile, which a training on CUDA uses, needs a C compiler. tini passes signals on to all processes.
# hadolint ignore=DL3008
RUN case "$TORCH" in cpu) compiler=() ;; cuda) compiler=(gcc libc6-dev) ;; *) echo "TORCH is cpu or cuda" >&2; exit 2 ;; esac; \
    apt-get update; \
    apt-get install --yes --no-install-recommends git tini "${compiler[@]}"; \
    rm -rf /var/lib/apt/lists/*; \
    git config --system --add safe.directory /project

# The packages change rarely: a layer of their own. A user without a name cannot write compiled files later.
WORKDIR /project
RUN --mount=type=bind,source=requirements,target=requirements \
    --mount=type=cache,target=/root/.cache/pip,sharing=locked \
    python requirements/install.py /usr/local base postgres s3 team --torch "$TORCH"; \
    python -m compileall -q -j 0 /usr/local/lib >/dev/null || true # packages have files for other Pythons

COPY . .
# The folder belongs to the group 0, which is the group of any user without a name: an empty volume that is mounted here
# gets these files, and this user can write to them. DVC works without git here, since the image has no .git.
RUN python requirements/install.py /usr/local project; \
    rm -rf build ./*.egg-info; \
    dvc config --local core.no_scm true; \
    python -m compileall -q pipeline stages webapp; \
    chmod -R g=u /project

# Programs write to /project and /tmp only, so the rest may be read-only. A user without a name has no home folder, and
# Python's getpass and torch need a name.
ENV HOME=/tmp \
    USER=totarget \
    XDG_CACHE_HOME=/tmp/.cache \
    MPLCONFIGDIR=/tmp/.cache/matplotlib \
    DVC_SITE_CACHE_DIR=/tmp/.cache/dvc-site \
    MLFLOW_DISABLE_TELEMETRY=true \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PYTHONUNBUFFERED=1
USER 10001:0
# As Ctrl-C in a terminal: a training saves a checkpoint before it ends.
STOPSIGNAL SIGINT
ENTRYPOINT ["tini", "-g", "--"]

EXPOSE 7860
CMD ["python", "app.py", "--host", "0.0.0.0"]
HEALTHCHECK --start-period=120s --start-interval=2s --interval=30s --timeout=10s \
    CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:7860/health', timeout=9)"]
