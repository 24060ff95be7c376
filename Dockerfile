# syntax=docker/dockerfile:1
# The commands of pg_ground on a CPU.
#
#   docker build -t pg-ground .
#   docker run --rm -v "$PWD/runs:/runs" pg-ground \
#       train --config=configs/quickstart.py --workdir=/runs/quickstart
#
# The installed package ships the recipes, so `configs/quickstart.py` works in any directory.
FROM python:3.13-slim

RUN --mount=type=bind,target=/source \
    cp -r /source /tmp/pg_ground \
    && pip install --no-cache-dir /tmp/pg_ground \
    && rm -rf /tmp/pg_ground

WORKDIR /runs
ENTRYPOINT ["pg-ground"]
CMD ["--help"]
