# syntax=docker/dockerfile:1
# Builds an image that serves:
#   docker build -t lockstep . && docker run --rm --init --network host lockstep --recipe demo
# NVIDIA GPUs need no CUDA base image: PyTorch's wheels contain CUDA's libraries, the container
# toolkit provides the driver. OPERATIONS.md has the options and limits to run it with.
ARG PYTHON=3.12
FROM python:${PYTHON}-slim-bookworm

# cuda, or cpu for an image without the C compiler, which only GPUs need.
ARG DEVICE=cuda
ARG TORCH=2.13.0

# Kernels for CPUs run on OpenMP's threads. Triton compiles a launcher for each kernel with a C compiler, at
# run time.
RUN if [ "$DEVICE" = cuda ]; then compiler="gcc libc6-dev"; fi \
    && apt-get update && apt-get install -y --no-install-recommends libgomp1 $compiler \
    && rm -rf /var/lib/apt/lists/*

# torch has a layer of its own, the first: it is the largest and changes least.
RUN pip install --no-cache-dir "torch==$TORCH"

COPY . /src
RUN pip install --no-cache-dir -c /src/constraints.txt /src && rm -rf /src && launch plan --recipe demo > /dev/null

RUN useradd --create-home --uid 10001 lockstep
USER lockstep
WORKDIR /home/lockstep

# Port of the healthcheck; the server's own port is in the recipe.
ENV PORT=8000
EXPOSE 8000
# A large checkpoint loads for minutes; failed checks do not count during start-period.
HEALTHCHECK --interval=15s --timeout=5s --start-period=30m --retries=3 \
    CMD ["python", "-c", "import os, urllib.request; urllib.request.urlopen(f\"http://127.0.0.1:{os.environ['PORT']}/health\", timeout=4)"]
# SIGTERM drains.
STOPSIGNAL SIGTERM
ENTRYPOINT ["launch"]
CMD ["--recipe", "demo", "frontend.host=0.0.0.0"]
