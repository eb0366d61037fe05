#!/usr/bin/env bash
# Everything there is to learn about the kernels on one GPU machine, in one command, in order of
# importance. Needs Python 3.11 with torch and triton, no network, and builds nothing.
#
#   benchmarks/gpu_check.sh --out FOLDER [--wheels FOLDER] [--seconds N] [--device cuda|cpu]
#
# --wheels: packages that the machine may lack (typer, rich, pytest, pydantic, ...; rivals too).
# --seconds: the whole (default 1500); each part has its own limit within it, and what is left over
# goes to the next. Results are written as they come, so a killed run leaves those of the parts
# before: FOLDER/status.txt, one line a part, and a log and JSON for each.
# --device cpu runs every part on small sizes, to try the script.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2

device=cuda out= wheels= seconds=1500
while [ $# -gt 0 ]; do
  case "$1" in
    --device) device=$2 ;;
    --out) out=$2 ;;
    --wheels) wheels=$2 ;;
    --seconds) seconds=$2 ;;
    *) echo "unknown option $1; there are --out --wheels --seconds --device" >&2; exit 2 ;;
  esac
  shift 2
done
[ -n "$out" ] || { echo "--out FOLDER is missing" >&2; exit 2; }
mkdir -p "$out"
out=$(cd "$out" && pwd)
python=${PYTHON:-python3}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
[ "$device" = cuda ] && unset TRITON_INTERPRET
end=$((SECONDS + seconds))

# part NAME LIMIT_SECONDS COMMAND...: one time-bounded part, whose failure stops no other.
part() {
  local name=$1 limit=$2 left=$((end - SECONDS)) start=$SECONDS
  shift 2
  [ "$left" -gt 5 ] || { echo "$name: skipped, no time left" | tee -a "$out/status.txt"; return; }
  [ "$limit" -lt "$left" ] || limit=$left
  timeout --kill-after=10 "$limit" "$@" >"$out/$name.log" 2>&1
  echo "$name: exit status $? after $((SECONDS - start)) s of $limit" | tee -a "$out/status.txt"
}

: >"$out/status.txt"
nvidia-smi >"$out/nvidia-smi.txt" 2>&1
if [ -n "$wheels" ]; then
  # One by one: a wheel for another machine must not keep the others out.
  for wheel in "$wheels"/*.whl; do
    "$python" -m pip install --no-index --no-deps -q "$wheel" >>"$out/install.log" 2>&1 ||
      echo "not installed: $wheel" | tee -a "$out/status.txt"
  done
fi
part doctor 120 "$python" -m flowrl.cli doctor

if [ "$device" = cuda ]; then
  tests=(tests/kernels --deselect tests/kernels/test_compile.py) rows=8192 long=32768
  heads=(qwen2.5-7b llama-3-8b qwen2.5-32b qwen2.5-0.5b) drops=(--drop-mass 0.001953125)
else
  tests=(tests/kernels/test_segment_mean.py) rows=32 long=48
  heads=(smollm2-135m) drops=(--drop-mass 0.001953125 --variant reference)
fi
# Options of pytest's plugins stand in pyproject.toml; a bare machine may lack the plugins.
part tests 420 "$python" -m pytest -o addopts= -q -p no:cacheprovider "${tests[@]}"
part capture 120 "$python" benchmarks/check_capture.py --device "$device" --json "$out/capture.json"
bench=("$python" -m flowrl.cli bench kernels --device "$device" --dtype bfloat16 "${drops[@]}")
for peak in 3 0; do # a few per cent of the pairs kept, then all of them
  for head in "${heads[@]}"; do
    name=bench_${head}_${rows}_peak$peak
    part "$name" 240 "${bench[@]}" --head "$head" --rows "$rows" --peak "$peak" --repeats 10 \
      --json "$out/$name.json"
  done
done
part "bench_${heads[0]}_${long}_peak3" 240 "${bench[@]}" --head "${heads[0]}" --rows "$long" \
  --peak 3 --repeats 5 --json "$out/bench_${heads[0]}_${long}_peak3.json"
part train 240 "$python" -m flowrl.cli train configs/tiny.yaml trainer.device="$device" \
  trainer.total_training_steps=10 trainer.test_freq=10 trainer.default_local_dir="$out/train"
cat "$out/status.txt"
grep -q -v 'exit status 0' "$out/status.txt" && exit 1
exit 0
