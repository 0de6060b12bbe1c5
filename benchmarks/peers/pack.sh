#!/usr/bin/env bash
# Packs what the quality benchmark needs on a GPU host without a registry: x86-64, Python 3.12, with torch,
# pytorch-lightning, numpy, scipy, pyarrow, safetensors and rich there. RecTools 0.19 does not run on pandas 3, so
# pandas 2 comes along; tensorboardX is what our own training journal writes with.
# usage: benchmarks/peers/pack.sh DIR    (about 28 MiB; keep DIR out of git)
# On the host: source benchmarks/peers/install.sh DIR
set -euo pipefail
platforms=(--platform manylinux_2_28_x86_64 --platform manylinux_2_27_x86_64 --platform manylinux_2_24_x86_64
  --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64)
fetch() {
  python3 -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp "${platforms[@]}" -d "$@"
}
mkdir -p "$1/ours" "$1/peers"
fetch "$1/ours" tensorboardX
fetch "$1/peers" rectools==0.19.0 pm-implicit==0.7.3 pandas==2.3.3 pytz typeguard==4.6.0 fastrlock \
  pydantic==2.14.3 pydantic-core==2.50.4 annotated-types typing-inspection
du -sh "$1"
