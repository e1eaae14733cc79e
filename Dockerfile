# The image of `python -m launch.image build`: uae_jax for TPU, with its configs, as a user without privileges.
FROM python:3.12.12-slim-bookworm@sha256:593bd06efe90efa80dc4eee3948be7c0fde4134606dd40d8dd8dbcade98e669c

# The launchers mount the run's bucket at /mnt/bucket; a sweep compiles each program once for all of its runs.
ENV PYTHONUNBUFFERED=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    JAX_COMPILATION_CACHE_DIR=/mnt/bucket/compilation_cache

RUN groupadd --gid 1000 uae && useradd --uid 1000 --gid uae --create-home uae && install -d -o uae -g uae /mnt/bucket

# Exact versions, each with its hash; a layer of their own, because the code changes more often.
COPY launch/requirements.txt /app/launch/requirements.txt
RUN grep '^setuptools==' /app/launch/requirements.txt > /tmp/build.txt \
    && pip install --require-hashes -r /tmp/build.txt \
    && pip install --require-hashes --no-build-isolation -r /app/launch/requirements.txt

WORKDIR /app
COPY . /app
RUN pip install --no-deps --no-build-isolation --editable .

USER 1000:1000
ENTRYPOINT ["uae-jax"]
CMD ["--help"]
