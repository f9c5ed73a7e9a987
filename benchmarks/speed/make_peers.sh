#!/bin/sh
# Installs what `python -m benchmarks.speed` compares this server with into .venv-vllm and .venv-llama of the working folder.
# Safe to repeat, and goes on where it was stopped. JOBS limits the compilers (llama.cpp takes many minutes on one).
set -eu
python=${1:-python3}
pip="-m pip install --quiet --disable-pip-version-check"
llama_cpp_python=0.3.36
# llama.cpp's version, and how often the way to build it has changed: what was built otherwise is built again.
llama_build=$llama_cpp_python-2

# A GPU that can be used, not merely a compiler for one.
if command -v nvidia-smi >/dev/null && nvidia-smi >/dev/null 2>&1; then gpu=ON; else gpu=OFF; fi

sh "$(dirname "$0")/make_vllm.sh" "$python"

# vLLM's manual advises it on a CPU. Without it vLLM may be slower; the tables say what it had.
if [ $gpu = OFF ] && ! ls /usr/lib/*/libtcmalloc_minimal.so.4 >/dev/null 2>&1; then
    [ "$(id -u)" = 0 ] && as_root="" || as_root=sudo
    { $as_root apt-get update -q && $as_root apt-get install -q -y --no-install-recommends libtcmalloc-minimal4; } ||
        echo "make_peers.sh: tcmalloc could not be installed; vLLM will be measured without it" >&2
fi

# llama.cpp: its libraries, server and converter, all from the sources that the Python bindings carry.
if [ ! -e .venv-llama/.installed-$llama_build ]; then
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
    # GCC 12's _tile_loadconfig claims to read 8 of its 64 bytes. The elimination of dead stores then drops the tiles'
    # sizes, and the first AMX product, which only quantized weights come to, ends with SIGILL.
    if grep -qs amx_int8 /proc/cpuinfo; then amx="-fno-tree-dse -fno-dse"; else amx=""; fi
    cmake -S .venv-llama/src/vendor/llama.cpp -B .venv-llama/build -G Ninja \
        -DCMAKE_BUILD_TYPE=Release -DCMAKE_CXX_FLAGS="$amx" -DBUILD_SHARED_LIBS=ON -DGGML_CUDA=$gpu \
        -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_APP=OFF \
        -DLLAMA_CURL=OFF -DLLAMA_OPENSSL=OFF -DLLAMA_USE_PREBUILT_UI=OFF
    cmake --build .venv-llama/build --target llama-server --parallel "${JOBS:-$(nproc)}"
    # the bindings alone: they take the libraries just built (LLAMA_CPP_LIB_PATH)
    $llama $pip --config-settings cmake.define.LLAMA_BUILD=OFF .venv-llama/src
    touch .venv-llama/.installed-$llama_build
fi
