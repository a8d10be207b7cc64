# The suite with all its packages, for machines with NVIDIA GPUs or without:
#     docker build -t fewlabel .
#     docker run --rm -it fewlabel bash run_all.sh
#     docker run --rm -it --gpus all -v "$PWD/runs":/fewlabel/runs fewlabel bash
FROM python:3.11-slim-bookworm

# CUDA and cuDNN are inside PyTorch's wheels; the host brings the driver and NVIDIA's container toolkit.
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    PYTHONUNBUFFERED=1 \
    PYTHONPATH=/fewlabel

# What torch.compile builds its kernels with.
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*

WORKDIR /fewlabel
COPY requirements.txt .
RUN python -m pip install --no-cache-dir -r requirements.txt

RUN useradd --create-home --uid 1000 fewlabel && chown fewlabel /fewlabel
COPY --chown=fewlabel . .
USER fewlabel
CMD ["bash", "run_all.sh"]
