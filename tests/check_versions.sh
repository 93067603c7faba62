#!/usr/bin/env bash
# Installs the package at both ends of what it supports, each in a new virtual environment, and makes a short run there:
#
#     tests/check_versions.sh [OLDEST] [NEWEST]      two interpreters, python3.10 and python3.14 if not given
#
# The oldest gets torch 2.5.0 and the lowest releases that pyproject.toml allows, the newest the newest of everything.
# It downloads gigabytes and takes minutes, so CI does not run it.
# TORCH_INDEX=... takes torch from another index, such as the one of its CPU builds; PyPI's are gigabytes of CUDA.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
export OMP_NUM_THREADS=1 PYTHONPATH=

check() { # name, interpreter, then what pip is to install first, from the index of torch
    local name=$1 python=$2 bin=$place/$1/bin
    shift 2
    "$python" -m venv "$place/$name"
    "$bin/pip" install --quiet ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} "$@"
    "$bin/pip" freeze | grep -iE "^torch(vision)?==" | sed "s/+.*//" >>"$place/$name.txt"
    "$bin/pip" install --quiet --constraint "$place/$name.txt" "$root"
    mkdir "$place/$name/work"
    cd "$place/$name/work"
    "$bin/python" -c "import flowdistill, sys; assert flowdistill.__file__.startswith(sys.prefix), flowdistill.__file__"
    "$bin/flowdistill" list >list.txt
    "$bin/flowdistill" train freeflow/ring.gin --gin.train.steps=20 --gin.evaluation.num_samples=100 --workdir run
    "$bin/flowdistill" sample run --num_samples 16 --out samples.npz
    test -s run/report.md -a -s samples.npz
    "$bin/flowdistill" train meanflow --on plane --gin.train.steps=5 --gin.evaluation.num_samples=100 --workdir plane
    "$bin/flowdistill" export plane student --programs torch diffusers
    test -s student/student.pt2 -a -s student/flow_map/flow_map.pt2
    "$bin/flowdistill" doctor
    cd "$root"
}

# The lower bounds of the required dependencies, as a file of constraints.
sed -n '/^dependencies = \[/,/^\]/s/^ *"\([A-Za-z_-]*\)>=\([0-9.]*\).*/\1==\2.*/p' "$root/pyproject.toml" |
    grep -v "^torch==" >"$place/oldest.txt"
touch "$place/newest.txt"

check oldest "${1:-python3.10}" torch==2.5.0 torchvision==0.20.0 "numpy$(sed -n 's/^numpy//p' "$place/oldest.txt")"
check newest "${2:-python3.14}" torch torchvision
echo "both ends work"
