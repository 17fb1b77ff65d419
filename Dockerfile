# vlm-train with the locked packages. PyTorch's wheels bring their own CUDA libraries; the base image brings the compiler
# that torch.compile and Triton call.
#   docker build -t vlm-train . && docker run --gpus all --ipc=host -v $PWD/runs:/workspace/runs vlm-train train experiment=quickstart
FROM nvidia/cuda:13.0.1-devel-ubuntu24.04
ENV DEBIAN_FRONTEND=noninteractive PIP_DISABLE_PIP_VERSION_CHECK=1 PATH=/opt/vlm-train/bin:$PATH
RUN apt-get update \
 && apt-get install -y --no-install-recommends python3 python3-venv python3-dev build-essential \
 && rm -rf /var/lib/apt/lists/*
WORKDIR /workspace
COPY requirements.lock ./
RUN python3 -m venv /opt/vlm-train && pip install --no-cache-dir --require-hashes -r requirements.lock
COPY pyproject.toml README.md ./
COPY vlm_train ./vlm_train
COPY conf ./conf
RUN pip install --no-cache-dir --no-deps .
ENTRYPOINT ["vlm-train"]
