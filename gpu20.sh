#!/usr/bin/env bash
# Measures issue 20 on GPUs of one host. Not committed.
#   WHEELS=wheels bash gpu20.sh PART [GPUS]      (WHEELS: a copy of /tmp/b20wheels, 11 MB)
# A part, and the minutes expected on 2 H100s (a cold machine adds 1 to 2; all parts together 35 to 40):
#   test       5   pytest -m gpu tests/test_parallel.py; deepspeed on 2 GPUs trains, stops and continues
#   ddp        5   124M, 1 GPU and all, compile model and blocks, 65k per GPU and 0.5M      (run it twice)
#   buckets    5   the same on all GPUs with buckets of 25, 100, 400, 1000 MB
#   fsdp       5   1.5B, ddp / fsdp / fsdp not resharding                                   (run it twice)
#   large      5   6.7B, fsdp with activation checkpointing (more than ddp can hold on 80 GB)
#   deepspeed  8   1.5B, fsdp beside ZeRO 2 and 3, compiled and not
#   losses     6   50 steps: 1 GPU, ddp, fsdp, ZeRO 2 and 3, another seed; fp32 and bf16
# On 4 GPUs (second argument): ddp 5, fsdp 5, large 4, deepspeed 8.
set -uo pipefail
cd "$(dirname "$0")"
part=${1:-test} gpus=${2:-2} wheels=${WHEELS:-wheels} out=${OUT:-/tmp}
export NCCL_NVLS_ENABLE=0
python=$(command -v python3.12 || command -v python3 || command -v python)
$python -c "import deepspeed" 2>/dev/null ||
    $python -m pip install -q --no-index --no-deps --break-system-packages "$wheels"/*.whl
for name in pytest tiktoken requests; do
    $python -c "import $name" 2>/dev/null ||
        $python -m pip install -q --no-index --no-deps --break-system-packages "$wheels"/extra/*.whl
done
$python -c "import torch, deepspeed; print(torch.__version__, deepspeed.__version__, torch.cuda.get_device_name())" | tail -1
bench() { timeout 590 "$python" tests/bench_parallel.py "$@" 2>&1 | tee -a "$out/bench_$part.txt"; }
case $part in
test)
    timeout 400 "$python" -m pytest -m gpu tests/test_parallel.py 2>&1 | tail -30 | tee "$out/test.txt"
    options="--n_layer=4 --n_embd=256 --n_head=4 --block_size=32 --batch_tokens=2048 --micro_batch_size=8"
    options+=" --dataset=dataset --data_dir=tests/fixtures --out_dir=/tmp/zero --init_from=auto --parallel=deepspeed"
    options+=" --eval_interval=10 --warmup_steps=2 --log_interval=5 --decay=linear --min_lr=6e-4"
    options+=" --compile=blocks"
    for steps in 10 20; do
        timeout 120 "$python" -m torch.distributed.run --standalone --nproc_per_node="$gpus" \
            train.py $options --max_steps=$steps 2>&1 | grep -a "loss\|rror" | tail -8 | tee -a "$out/test.txt"
    done
    ;;
ddp | fsdp | losses) bench --row="$part" --gpus="$gpus" --turns=1 ;;
buckets) bench --row=buckets --gpus="$gpus" --turns=1 ;;
large) bench --row=large --gpus="$gpus" --turns=1 --steps=20 ;;
deepspeed) bench --row=deepspeed --gpus="$gpus" --turns=1 --steps=15 ;;
esac
