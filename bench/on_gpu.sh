#!/bin/bash
# What a machine with a GPU is asked first, in parts that can be chosen: is it right there, then how fast is it?
#
#     bash bench/on_gpu.sh FOLDER facts right check speed kernels whole lanes      # any of them, in any order
#
# Figures go to FOLDER/*.jsonl, what is said to FOLDER/on_gpu.log, and to the terminal. A part that fails or takes
# too long does not keep the others from running, and makes the exit code 1. PYTHON says which Python (default:
# python3). CASE, MODELS, ROWS and SECONDS_CHECK, SECONDS_KERNELS, SECONDS_WHOLE narrow what is asked.
set -uo pipefail
folder=$(mkdir -p "$1" && cd "$1" && pwd) || exit
shift
python=${PYTHON:-python3}
cd "$(dirname "$0")/.." || exit
export PYTHONUNBUFFERED=1 COLUMNS=200
log=$folder/on_gpu.log
rm -f "$folder/failed"

part() {  # seconds, words...
    local limit=$1 began=$SECONDS
    shift
    echo "== $*"
    timeout -k 5 "$limit" "$@"
    local code=$?
    echo "== code $code after $((SECONDS - began)) s"
    [ "$code" = 0 ] || echo "$*" >> "$folder/failed"
}

bench() {  # seconds, words...
    local limit=$1
    shift
    part "$limit" "$python" -W ignore -m bench "$@" --out "$folder/$1.jsonl"
}

for name in "$@"; do
    case $name in
    facts)
        part 20 nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
        part 30 "$python" -m engine.cluster.found 127.0.0.1
        ;;
    right)  # over gRPC and not, at the same time: nothing is timed
        XLA_PYTHON_CLIENT_MEM_FRACTION=0.3 part 150 "$python" -m engine.cli demo > "$folder/demo.log" 2>&1 &
        bench 170 serve --only tokens
        wait
        tail -n 30 "$folder/demo.log"
        ;;
    check) bench 200 kernels --only ceilings,check --case "${CASE:-}" --seconds "${SECONDS_CHECK:-110}" ;;
    speed) bench 240 serve --only speed --models "${MODELS:-qwen3-0.6b}" --rows "${ROWS:-1,64}" ;;
    kernels) bench 300 kernels --only ceilings,speed --case "${CASE:-}" --seconds "${SECONDS_KERNELS:-120}" ;;
    whole) bench 300 kernels --only step --seconds "${SECONDS_WHOLE:-120}" ;;
    lanes)  # two lanes of a cluster, in processes of their own, that share the first GPU
        cat > "$folder/lab.toml" <<'END'
[cluster]
name = "lab"
[[host]]
name = "a"
address = "127.0.0.1"
devices = [0]
[[host]]
name = "b"
address = "127.0.0.2"
devices = [0]
[[lane]]
name = "p0"
role = "prefill"
mesh = "tp=1"
hosts = ["a"]
[[lane]]
name = "d0"
role = "decode"
mesh = "tp=1"
hosts = ["b"]
[serve]
max_num_seqs = 2
max_num_batched_tokens = 64
kv_memory = 268435456
END
        XLA_PYTHON_CLIENT_MEM_FRACTION=0.2 timeout --foreground 200 "$python" -m engine.cli launch "$folder/lab.toml" --over local \
            > "$folder/ready.json" 2> "$folder/lanes.log" &
        until [ -s "$folder/ready.json" ] || [ -z "$(jobs -r)" ]; do sleep 0.5; done
        part 30 "$python" -m engine.cli generate "$(printf 'import os\nimport sys\n%.0s' {1..40})" --max-tokens 48 --temperature 0
        part 30 "$python" -m engine.cli status
        kill %?launch
        wait
        tail -n 15 "$folder/lanes.log"
        ;;
    esac
done 2>&1 | tee "$log"
[ ! -e "$folder/failed" ]
