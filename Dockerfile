# trainmerge in a container, as a user without rights.
#   docker build -t trainmerge .                            for processors
#   docker build -t trainmerge --build-arg TORCH=cu130 .    for NVIDIA GPUs (docker run --gpus all)
#   docker run --rm -v "$PWD:/work" trainmerge fit configs/demo.yaml runs/demo
FROM python:3.11-slim

# The name of a torch index: cpu, cu126, cu128, cu130.
ARG TORCH=cpu
ARG TORCH_INDEX=https://download.pytorch.org/whl

RUN useradd --create-home merge
COPY pyproject.toml README.md LICENSE requirements.lock /src/
COPY trainmerge /src/trainmerge
RUN torch=$(grep '^torch==' /src/requirements.lock) \
    && pip install --no-cache-dir --index-url "$TORCH_INDEX/$TORCH" "$torch" \
    && grep -vE '^(torch|triton|nvidia-.*|cuda-.*)==' /src/requirements.lock > /src/constraints \
    && pip install --no-cache-dir -c /src/constraints /src \
    && rm -r /src

USER merge
WORKDIR /work
# Base and experts by their ids land in /home/merge/.cache/huggingface; mount a volume there to keep them.
ENTRYPOINT ["trainmerge"]
CMD ["--help"]
