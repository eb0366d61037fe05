#!/usr/bin/env bash
# Everything there is to learn about the kernels on one GPU machine, in one command, in order of
# importance. Needs Python 3.11 or later with torch, triton and transformers, no network, and
# builds nothing.
#
#   benchmarks/gpu_check.sh --out FOLDER [--part NAME]... [--wheels FOLDER] [--seconds N]
#                           [--archive FILE] [--device cuda|cpu]
#
# --part: kernels (tests, graph capture, memory checker), bench (the head against its rivals), train
#   (a step with our head and with logits, a short run), profile (ncu, where it is installed) or
#   tune (block sizes), in the order given. Default: all but profile, as far as the time goes.
#   Three calls get through everything: kernels; bench; train, profile and tune.
# --wheels: packages that the machine may lack; flowrl imports pydantic, typer, rich, pyyaml and numpy,
#   the tests pytest. Rivals too.
# --seconds: the whole call (default 540); each step has its own limit within it, and what is left
#   over goes to the next. Results are written as they come, so a killed call leaves those of the
#   steps before: FOLDER/status.txt, one line a step, and a log, JSON or CSV for each.
# --archive: FOLDER packed anew after each step, for a machine that gives back few files.
# --device cpu runs every part on small sizes, to try the script.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
SECONDS=0

device=cuda out='' wheels='' archive='' seconds=540 parts=() failed=0
while [ $# -gt 0 ]; do
  case "$1" in
    --device) device=${2-} ;;
    --out) out=${2-} ;;
    --wheels) wheels=${2-} ;;
    --archive) archive=${2-} ;;
    --seconds) seconds=${2-} ;;
    --part) parts+=("${2-}") ;;
    *) echo "unknown option $1; there are --out --part --wheels --seconds --archive --device" >&2
       exit 2 ;;
  esac
  [ $# -ge 2 ] || { echo "$1 has no value" >&2; exit 2; }
  shift 2
done
[ -n "$out" ] || { echo "--out FOLDER is missing" >&2; exit 2; }
[ ${#parts[@]} -gt 0 ] || parts=(kernels bench train tune)
for name in "${parts[@]}"; do
  case "$name" in
    kernels | bench | train | profile | tune) ;;
    *) echo "unknown part $name; there are kernels bench train profile tune" >&2; exit 2 ;;
  esac
done
mkdir -p "$out"
out=$(cd "$out" && pwd)
python=${PYTHON:-python3}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
[ "$device" = cuda ] && unset TRITON_INTERPRET

note() {
  echo "$1" | tee -a "$out/status.txt"
}

pack() {
  [ -z "$archive" ] || { tar czf "$archive.new" -C "$out" . && mv "$archive.new" "$archive"; }
}

# run NAME LIMIT_SECONDS COMMAND...: one time-bounded step, whose failure stops no other.
run() {
  local name=$1 limit=$2 left=$((seconds - SECONDS)) start=$SECONDS code
  shift 2
  if [ "$left" -le 5 ]; then
    note "$name: skipped, no time left"
    failed=1
    return
  fi
  [ "$limit" -lt "$left" ] || limit=$left
  timeout --kill-after=5 "$limit" "$@" >"$out/$name.log" 2>&1
  code=$?
  [ "$code" -eq 0 ] || failed=1
  note "$name: exit status $code after $((SECONDS - start)) s of $limit"
  pack
}

has_module() {
  "$python" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$1') is None)"
}

part_kernels() {
  # Options of pytest's plugins stand in pyproject.toml; a bare machine may lack the plugins.
  local pytest=("$python" -m pytest -o addopts= -v -ra -p no:cacheprovider) folder=tests/kernels
  local capture=("$python" benchmarks/check_capture.py --device "$device") tool shape
  if [ "$device" = cpu ]; then
    run tests 120 "${pytest[@]}" -k "by_hand or loop" $folder/test_segment_mean.py
    run capture 60 "${capture[@]}" --json "$out/capture.json"
    return
  fi
  # Most of the time goes to compiling, which the workers share by way of Triton's cache.
  has_module xdist && pytest+=(-n 8)
  run tests_head 240 "${pytest[@]}" $folder/test_linear_logprob_triton.py \
    $folder/test_linear_logprob_pairs.py
  run capture 90 "${capture[@]}" --json "$out/capture.json"
  run tests_rest 180 "${pytest[@]}" $folder --ignore $folder/test_compile.py \
    --ignore $folder/test_linear_logprob_triton.py --ignore $folder/test_linear_logprob_pairs.py
  if ! command -v compute-sanitizer >/dev/null; then
    note "sanitizer: not run: compute-sanitizer is not installed"
    return
  fi
  # Each tensor by cudaMalloc: inside a block that PyTorch caches, an access beyond is no error.
  export PYTORCH_NO_CUDA_MEMORY_CACHING=1
  for tool in memcheck racecheck; do
    # TMA, addresses, tf32; of 4970 entries a fifth of the pairs is kept, so the pair kernels run.
    for shape in "72 bfloat16" "70 bfloat16" "36 float32"; do
      set -- $shape
      run "${tool}_$1_$2" 120 compute-sanitizer --tool $tool --error-exitcode 9 \
        --target-processes application-only "${capture[@]}" --once --rows 300 --hidden "$1" \
        --vocab 4970 --dtype "$2"
    done
  done
  unset PYTORCH_NO_CUDA_MEMORY_CACHING
}

part_bench() {
  local bench=("$python" -m flowrl.cli bench kernels --device "$device" --dtype bfloat16)
  local heads=(qwen2.5-7b llama-3-8b qwen2.5-32b qwen2.5-0.5b) rows=8192 long=32768 variant name
  bench+=(--drop-mass 0.001953125)
  if [ "$device" = cpu ]; then
    heads=(smollm2-135m) rows=32 long=48
    bench+=(--variant reference)
  else # all but the reference, which takes seconds a pass
    for variant in triton "triton kept" "triton drop 2.0e-03" torch.compile "torch chunked" cce \
      "liger scaled" "liger fused" quack verl; do
      bench+=(--variant "$variant")
    done
  fi
  for peak in 3 0; do # a few per cent of the pairs kept, then all of them
    for head in "${heads[@]}"; do
      name=bench_${head}_${rows}_peak$peak
      run "$name" 180 "${bench[@]}" --head "$head" --rows "$rows" --peak "$peak" --repeats 10 \
        --json "$out/$name.json"
    done
  done
  name=bench_${heads[0]}_${long}_peak3
  run "$name" 180 "${bench[@]}" --head "${heads[0]}" --rows "$long" --peak 3 --repeats 5 \
    --json "$out/$name.json"
}

part_tune() {
  local tune=("$python" benchmarks/tune_linear_logprob.py --json "$out/tune.json")
  if [ "$device" = cpu ]; then
    run tune 120 env TRITON_INTERPRET=1 "${tune[@]}" --device cpu --kernel pair_p
  else
    run tune 500 "${tune[@]}"
  fi
}

part_train() {
  local train=("$python" benchmarks/bench_train.py --device "$device") size
  if [ "$device" = cpu ]; then
    run step_tiny 60 "${train[@]}" --tokens 512 --length 64 --repeats 1 \
      --json "$out/step_tiny.json"
  else
    for size in qwen2.5-0.5b qwen2.5-1.5b; do
      run "step_$size" 150 "${train[@]}" --size $size --json "$out/step_$size.json"
    done
  fi
  run train 120 "$python" -m flowrl.cli train configs/tiny.yaml trainer.device="$device" \
    trainer.total_training_steps=3 trainer.test_freq=3 trainer.default_local_dir="$out/train"
}

part_profile() {
  if ! command -v ncu >/dev/null; then
    note "profile: not run: ncu is not installed"
    return
  fi
  # One launch of each kernel and grid. Clocks are left as they are.
  run profile 240 ncu --clock-control none --csv --page details --log-file "$out/profile.csv" \
    --section SpeedOfLight --section MemoryWorkloadAnalysis --section Occupancy \
    --section WarpStateStats --kernel-name 'regex:^(forward|grad_|pair_)' \
    --filter-mode per-launch-config --launch-count 1 \
    "$python" benchmarks/check_capture.py --device "$device" --once --only linear_logprob \
    --rows 8192 --hidden 3584 --vocab 152064
}

note "$(date -u +%FT%TZ) ${parts[*]}, $seconds s, commit $(git rev-parse HEAD 2>&1 | tail -n 1)"
timeout 30 nvidia-smi >"$out/nvidia-smi.txt" 2>&1
if [ -n "$wheels" ]; then
  site=$(mktemp -d)
  # One by one: a wheel for another machine must not keep the others out.
  for wheel in "$wheels"/*.whl; do
    timeout 60 "$python" -m pip install --no-index --no-deps --no-compile -q --target "$site" \
      --upgrade "$wheel" >>"$out/install.log" 2>&1 || note "not installed: $wheel"
  done
  export PYTHONPATH="$site:$PYTHONPATH"
fi
run doctor 60 "$python" -m flowrl.cli doctor
for name in "${parts[@]}"; do
  "part_$name"
done
exit $failed
