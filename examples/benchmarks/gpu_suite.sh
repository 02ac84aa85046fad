#!/bin/bash
# Measure this package on a GPU, in five stages of less than nine minutes each. The stages "quick" and "rest" take the
# most valuable parts of them, in less than nine minutes together, for a machine that is lent for a quarter of an hour.
#
#   bash examples/benchmarks/gpu_suite.sh STAGE [DATA]        RESULTS=FILE: rows of the study that stage 5 does not repeat
#
#   quick versions, the self-test, tests of CUDA graphs and devices, the quantization kernels for three layers, one
#         ResNet-50 and one UNet step against bf16: at most 330 s in total
#   rest  convolutions of four layers, and, where they are installed, ncu on the quantization kernels and
#         compute-sanitizer on two tests: at most 200 s in total
#   K/N   part K of N of pytest -m gpu, for machines that come one after the other: at most 540 s
#   1     pytest -m gpu, the self-test, compute-sanitizer on a few kernel tests if it is installed
#   2     cuDNN's rates, and the time of every kernel against the ceilings of the machine
#   3     step time and peak memory against bf16; the kernels of a step; the cost of telemetry
#   4     accuracy, five seeds: DATA contains train/ and val/ with images/ and labels/; without it, shapes are drawn,
#         which needs pycocotools
#   5     the accuracy study (examples/accuracy), full size: DATA contains camvid/ and cifar10/; it stops after eight
#         minutes, in the middle of a run if need be, and the next call with the same OUT goes on there
#   all   1 to 4, within about 25 minutes
#
# Results go to $OUT (default runs/gpu) as they come: gpu_1.log .. gpu_4.log, selftest.json, results.jsonl, profile.txt and
# accuracy.json, which are at most eight files; stage 5 writes gpu_5.log and the folder study; quick writes gpu_quick.log,
# selftest.json, results.jsonl and kernels.tar.xz; rest writes gpu_rest.log, results.jsonl, ncu.csv and kernels.tar.xz.
# Kernels compile at their first use, one after the other: nearly all the time of a short run. So quick and rest begin
# with those of KERNELS=FILE (default runs/kernels.tar.xz, if it is there), and leave theirs in kernels.tar.xz for the
# next machine. A machine without a GPU makes such a file by examples/benchmarks/gpu_kernels.py.
# PYTHON names an interpreter with torch and triton (default python3). Nothing is installed; the package is used from
# this checkout. Exit status: 0 if all passed, 1 if something failed, 2 for a wrong command line or a machine without a
# GPU.
set -uo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit 2
PYTHON=${PYTHON:-python3}
OUT=${OUT:-runs/gpu}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 WANDB_MODE=offline

usage() {
    sed -n 's/^#   //p' "${BASH_SOURCE[0]}" | head -15 >&2
    exit 2
}

[[ $# -ge 1 && $# -le 2 ]] || usage
STAGE=$1
DATA=${2:-}
[[ $STAGE =~ ^([1-5]|all|quick|rest|[1-9]/[1-9])$ ]] || usage
KERNELS=${KERNELS:-runs/kernels.tar.xz}
if [[ $STAGE == 5 ]]; then
    if [[ ! -d $DATA/camvid/train || ! -d $DATA/cifar10 ]]; then
        echo "gpu_suite: no folders camvid/train and cifar10 in '$DATA': stage 5 needs DATA with both" >&2
        exit 2
    fi
elif [[ -n $DATA ]]; then
    for folder in {train,val}/{images,labels}; do
        [[ -d $DATA/$folder ]] && continue
        echo "gpu_suite: no folder $DATA/$folder: DATA holds train/ and val/, each with images/ and labels/" >&2
        exit 2
    done
fi
command -v "$PYTHON" > /dev/null || { echo "gpu_suite: no interpreter $PYTHON; set PYTHON" >&2; exit 2; }
# 30 s: the first import of torch reads gigabytes from a disk that may be slow
timeout --verbose --kill-after=2 30 "$PYTHON" - << 'CHECK' || exit 2
import sys
try:
    import torch
except ImportError:
    sys.exit("gpu_suite: this Python has no torch; set PYTHON to one that has")
if not torch.cuda.is_available():
    sys.exit("gpu_suite: needs a CUDA device, and torch sees none here")
CHECK
mkdir -p "$OUT" || exit 2
OUT=$(cd "$OUT" && pwd)
FAILED=0
GRACE=15  # seconds between a step's time limit and SIGKILL

# step SECONDS NAME COMMAND...: run a command with a time limit. A failure is counted and does not end the stage.
step() {
    local limit=$1 name=$2 begin=$SECONDS code
    shift 2
    echo "=== $name"
    timeout --kill-after="$GRACE" "$limit" "$@"
    code=$?
    [[ $code -eq 124 || $code -eq 137 ]] && echo "gpu_suite: $name ran past its $limit s"
    [[ $code -eq 0 ]] || { FAILED=1; echo "gpu_suite: $name FAILED (exit status $code)"; }
    echo "--- $name: $((SECONDS - begin)) s"
}

# The most valuable step comes first, because the machine may be gone before the end. All time limits of this stage, with
# their graces, sum to less than 330 s. The autotuned backend is left out (--no-triton): its searches alone would take as
# long as a step may.
stage_quick() {
    local processes=() GRACE=2 step_options=(--no-triton --rounds 5 --out "$OUT/results.jsonl")
    local layers=("unet 64->64 k3 @256" "unet 512->512 k3 @32" "r50 256->64 k1 @56")
    local versions="import platform, torch
from te_nvfp4_cv.backend import cache
from te_nvfp4_cv.version import __version__
print('python', platform.python_version(), 'package', __version__, cache.identity(torch.device('cuda', 0)))"
    unpack
    step 8 "versions" "$PYTHON" -c "$versions"
    step 55 "self-test" "$PYTHON" -m te_nvfp4_cv.cli selftest --json "$OUT/selftest.json"
    timeout --kill-after=2 5 "$PYTHON" -c 'import xdist' 2> /dev/null && processes=(-n 4)
    step 40 "CUDA graphs and devices" "$PYTHON" -m pytest -v -m gpu "${processes[@]}" -p no:cacheprovider \
        tests/gpu/test_graphs.py tests/gpu/test_gpu_devices.py
    step 38 "quantization kernels" "$PYTHON" examples/benchmarks/gpu_quantize.py --layers "${layers[@]}" \
        --out "$OUT/results.jsonl"
    step 65 "ResNet-50 step" "$PYTHON" examples/benchmarks/gpu_step.py --models resnet50 "${step_options[@]}"
    step 45 "UNet step" "$PYTHON" examples/benchmarks/gpu_step.py --models unet "${step_options[@]}"
    pack
}

# All time limits, with their graces, sum to less than 200 s. ncu leaves the clocks alone: they belong to the machine.
stage_rest() {
    local GRACE=2 metrics small=(--batch 16 --size 128 --no-graphs --no-triton --rounds 1 --repeats 1)
    local layers=("unet 64->64 k3 @256" "unet 512->512 k3 @32" "r50 256->64 k1 @56" "r50 256->256 k3 @14")
    unpack
    step 58 "convolutions" "$PYTHON" examples/benchmarks/gpu_conv.py --layers "${layers[@]}" --out "$OUT/results.jsonl"
    metrics=gpu__time_duration.sum,dram__throughput.avg.pct_of_peak_sustained_elapsed
    metrics+=,sm__inst_issued.avg.pct_of_peak_sustained_active,sm__inst_executed_pipe_alu.avg.pct_of_peak_sustained_active
    if command -v ncu > /dev/null; then
        step 38 "ncu" ncu --clock-control none --csv --log-file "$OUT/ncu.csv" --metrics "$metrics" --launch-count 12 \
            --kernel-name "regex:^(quantize|quantize_and_measure|produce)_kernel$" \
            "$PYTHON" examples/benchmarks/gpu_step.py --models unet "${small[@]}"
    else
        echo "no ncu here: bandwidth, issue and ALU use were not measured"
    fi
    if command -v compute-sanitizer > /dev/null; then
        step 38 "compute-sanitizer" compute-sanitizer --error-exitcode 9 --launch-timeout 30 \
            "$PYTHON" -m pytest -q -m gpu -p no:cacheprovider tests/gpu/test_sanitizer.py -k "activations or unpacking"
    else
        echo "no compute-sanitizer here: memory accesses were not checked"
    fi
    pack
}

# Compiled kernels of an earlier machine, and those of this one for the next.
unpack() {
    [[ -f $KERNELS ]] || { echo "no $KERNELS: every kernel compiles at its first use"; return; }
    step 10 "unpack kernels" "$PYTHON" -m te_nvfp4_cv.cli warm --load "$KERNELS"
}

pack() {
    step 12 "pack kernels" "$PYTHON" -m te_nvfp4_cv.cli warm --force --save "$OUT/kernels.tar.xz"
}

# Files of tests with the mark gpu, every N-th of them.
stage_slice() {
    local part=${STAGE%/*} parts=${STAGE#*/} processes=() files
    mapfile -t files < <(grep -rlE 'mark\.gpu|kernel_device' --include='test_*.py' tests | LC_ALL=C sort | \
        awk -v k="$part" -v n="$parts" 'NR % n == k % n')
    "$PYTHON" -c 'import xdist' 2> /dev/null && processes=(-n 8)
    step 500 "pytest -m gpu, part $STAGE" "$PYTHON" -m pytest -q -m gpu "${processes[@]}" -p no:cacheprovider "${files[@]}"
    pack
}

stage_1() {
    local processes=()  # kernels compile side by side; the self-test then finds them compiled
    "$PYTHON" -c 'import xdist' 2> /dev/null && processes=(-n 8)
    step 290 "pytest -m gpu" "$PYTHON" -m pytest -q -m gpu "${processes[@]}" --maxfail=20 -p no:cacheprovider tests
    step 150 "self-test" "$PYTHON" -m te_nvfp4_cv.cli selftest --json "$OUT/selftest.json"
    if command -v compute-sanitizer > /dev/null; then
        step 85 "compute-sanitizer" compute-sanitizer --error-exitcode 9 --launch-timeout 60 \
            "$PYTHON" -m pytest -q -m gpu -p no:cacheprovider tests/gpu/test_sanitizer.py
    else
        echo "no compute-sanitizer here: memory accesses were not checked"
    fi
}

stage_2() {
    step 230 "quantization kernels" "$PYTHON" examples/benchmarks/gpu_quantize.py --out "$OUT/results.jsonl"
    step 290 "convolutions" "$PYTHON" examples/benchmarks/gpu_conv.py --out "$OUT/results.jsonl"
}

stage_3() {
    local common=(--out "$OUT/results.jsonl" --profile "$OUT/profile.txt")
    step 165 "UNet step" "$PYTHON" examples/benchmarks/gpu_step.py --models unet "${common[@]}"
    step 165 "ResNet-50 step" "$PYTHON" examples/benchmarks/gpu_step.py --models resnet50 "${common[@]}"
    step 110 "UNet with SiLU" "$PYTHON" examples/benchmarks/gpu_step.py --models unet-silu --no-graphs "${common[@]}"
    step 40 "telemetry" "$PYTHON" examples/benchmarks/telemetry.py --device cuda --case small
    step 55 "inference" "$PYTHON" examples/benchmarks/inference.py --device cuda --batch 1 32 --json "$OUT/results.jsonl"
}

stage_4() {
    local data=() runs
    [[ -n $DATA ]] && data=(--data "$DATA" --layout masks --image-size 96 128)
    runs=$(mktemp -d)
    for seed in 0 1 2 3 4; do
        step 105 "accuracy, seed $seed" "$PYTHON" examples/unet_coco/train.py "${data[@]}" --workers 4 \
            --precisions bf16 nvfp4 delayed --recipe unet --epochs 20 --scale 0.25 --batch-size 16 --lr 3e-3 \
            --eval-every 10 --pictures 0 --no-wandb --seed "$seed" --out "$runs/seed$seed"
    done
    "$PYTHON" - "$runs" "$OUT/accuracy.json" << 'COLLECT' || FAILED=1
import json, pathlib, sys
runs = sorted(pathlib.Path(sys.argv[1]).glob("*/summary.json"))
found = {path.parent.name: json.loads(path.read_text()) for path in runs}
pathlib.Path(sys.argv[2]).write_text(json.dumps(found, indent=2) + "\n")
COLLECT
    rm -rf "$runs"
}

stage_5() {
    local before=()
    [[ -n ${RESULTS:-} ]] && before=(--results "$RESULTS")
    step 530 "accuracy study" "$PYTHON" examples/accuracy/study.py --size full --device cuda --data "$DATA" --minutes 8 \
        --out "$OUT/study" "${before[@]}"
}

stages=("$STAGE")
[[ $STAGE == all ]] && stages=(1 2 3 4)
for stage in "${stages[@]}"; do
    begin=$SECONDS
    log=gpu_${stage/\//of}.log run=stage_$stage
    [[ $stage == */* ]] && run=stage_slice
    "$run" > >(tee "$OUT/$log") 2>&1
    wait $!
    echo "stage $stage: $((SECONDS - begin)) s"
done
if [[ $FAILED -eq 0 ]]; then echo "gpu_suite: all passed; results in $OUT"; else echo "gpu_suite: something FAILED"; fi
exit "$FAILED"
