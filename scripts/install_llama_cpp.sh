#!/usr/bin/env bash
# llama.cpp (llama-cpp-python) and this package in a virtual environment of their own: scripts/install_llama_cpp.sh [FOLDER]
#
# FOLDER defaults to .venv-llama; PYTHON chooses the interpreter and PIP_ARGS is passed to pip, as in the Makefile.
# llama-cpp-python comes as source: building it takes a C++ compiler and about eight minutes of processor time.
# WHEELS, a folder, keeps the built wheel, so that another environment of the same machine need not build it again.
set -euo pipefail
cd "$(dirname "$0")/.."

VENV=${1:-.venv-llama}
PYTHON=${PYTHON:-python3}
TORCH=2.13.0
LLAMA=0.3.36   # the version in pyproject.toml's extra llama-cpp: node names and structs are no interface of llama.cpp
GGUF=0.19.0
WHEELS=${WHEELS:-$VENV/wheels}

say() { printf '%4d s  %s\n' "$SECONDS" "$*"; }
pip() { "$VENV/bin/python" -m pip "$1" --quiet --disable-pip-version-check ${PIP_ARGS:-} "${@:2}"; }

built() { ls "$WHEELS"/llama_cpp_python-"$LLAMA"-*.whl 2> /dev/null; }

if [ -z "$(built)" ] && ! command -v "${CXX:-c++}" > /dev/null; then
    echo "llama.cpp is built from source: expected a C++ compiler called ${CXX:-c++} (or CXX=...), found none; apt-get install g++." >&2
    exit 1
fi
[ -x "$VENV/bin/python" ] || "$PYTHON" -m venv "$VENV"

say "torch $TORCH"
pip install "torch==$TORCH"

mkdir -p "$WHEELS"
if [ -z "$(built)" ]; then
    say "building llama-cpp-python $LLAMA (without the parts for images)"
    CMAKE_ARGS="-DGGML_NATIVE=on -DLLAVA_BUILD=off -DMTMD_BUILD=off ${CMAKE_ARGS:-}" \
        pip wheel --no-deps --wheel-dir "$WHEELS" "llama-cpp-python==$LLAMA"
fi

say "llama-cpp-python, bh-routing and what its llama.cpp tests need"
pip install "torch==$TORCH" "$(built)[server]" "gguf==$GGUF"
pip install "torch==$TORCH" --editable . pytest pytest-timeout httpx
"$VENV/bin/python" -c "import llama_cpp, bh_routing; print('llama-cpp-python', llama_cpp.__version__, 'with bh-routing', bh_routing.__version__)"
say "done: $(du -sh "$VENV" | cut -f1) in $VENV"
