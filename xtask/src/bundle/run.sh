#!/usr/bin/env bash
# Tests and times moe-lora on a machine with an NVIDIA GPU; Rust is not needed.
#
#   ./run.sh tests                 every GPU test; a missing GPU is a failure
#   ./run.sh sanitize [TOOL]...    the tests on few, small cases under compute-sanitizer: memcheck initcheck synccheck racecheck
#   ./run.sh bench [ARGUMENT]...   times and shares of the floor, as `bin/moe-lora-bench gpu --help` says
#   ./run.sh peers [SYSTEM]... [ARGUMENT]...
#                                  the same layers through the C library and PyTorch (`peers/bench_peer.py` has the arguments),
#                                  beside rows of other systems; ROWS=rows is where ours are kept; named systems run in the same
#                                  process, from PEERS=FOLDER (made by `peers/prepare.py FOLDER SYSTEM...`)
#   ./run.sh ranks [ARGUMENT]...   a layer over several GPUs, threads and processes, adapters fully sharded or not: truth, swaps,
#                                  graphs and their times, a rank that dies; with one GPU, what one GPU can show of it; the
#                                  arguments are those of `bin/moe-lora-bench ranks`
#   ./run.sh all [ARGUMENT]...     one after the other; the arguments are those of bench
#
# TESTS="moe-lora-cuda-* moe-lora-layer-cuda" chooses programs, FILTER="graph" tests in them, LIMIT=300 ends a program
# that takes longer than so many seconds.
set -uo pipefail
cd "$(dirname "$0")"
export MOE_LORA_REQUIRE_GPU=1 MOE_LORA_FIXTURES="$PWD/golden" MOE_LORA_BIN="$PWD/bin/moe-lora"
export MOE_LORA_GENERATE_FIXTURES="$PWD/golden-generate"
limit=${LIMIT:-300}

# The chosen programs; none is a failure.
programs=()
choose() {
  local patterns pattern
  read -ra patterns <<<"${TESTS:-*}"
  for pattern in "${patterns[@]}"; do programs+=($(compgen -G "tests/$pattern")); done
  [ ${#programs[@]} -gt 0 ] || { echo "no program in tests/ is called ${TESTS:-*}"; failed=$((failed + 1)); }
}

# Runs "$@", prints one line about it, and on failure all that it said.
checked() {
  local name=$1 start=$SECONDS text status
  shift
  text=$(timeout "$limit" "$@" 2>&1 </dev/null)
  status=$?
  if grep -q SKIPPED <<<"$text"; then status=${status/#0/3}; fi
  printf '%-44s %s %4d s  %s\n' "$name" "$([ $status = 0 ] && echo ok || echo "FAILED ($status)")" $((SECONDS - start)) \
    "$(grep -E '^test result|ERROR SUMMARY|RACECHECK SUMMARY' <<<"$text" | sed 's/; 0 measured.*//; s/========= //' | paste -sd' ')"
  [ $status = 0 ] || { printf '%s\n' "$text"; failed=$((failed + 1)); }
}

run_tests() {
  local program
  for program in "${programs[@]}"; do checked "${program#tests/}" "$program" ${FILTER:-}; done
}

run_sanitizers() {
  local sanitizer program tool
  sanitizer=$(command -v compute-sanitizer || compgen -G '/usr/local/cuda*/bin/compute-sanitizer' | head -1)
  [ -n "$sanitizer" ] || { echo "compute-sanitizer is not installed"; failed=$((failed + 1)); return; }
  export MOE_LORA_CASES=${MOE_LORA_CASES:-3}
  [ $# -gt 0 ] || set -- memcheck initcheck synccheck racecheck
  for tool; do
    # Some tests ask the driver for what it must refuse.
    local options=(--tool "$tool" --target-processes all --error-exitcode 9)
    [ "$tool" != memcheck ] || options+=(--report-api-errors no)
    for program in "${programs[@]}"; do
      # The command starts programs of its own; the sanitizers follow them.
      checked "$tool ${program#tests/}" "$sanitizer" "${options[@]}" "$program" --test-threads 1 ${FILTER:-}
    done
  done
}

failed=0
command=${1:-help}
[ $# = 0 ] || shift
case $command in
  tests) choose && run_tests ;;
  sanitize) choose && run_sanitizers "$@" ;;
  bench) bin/moe-lora-bench gpu "$@" || failed=1 ;;
  peers)
    rows=${ROWS:-rows} others=()
    ${PYTHON:-python3} peers/bench_peer.py "$rows" moe_lora "$@" || failed=1
    for system; do
      [[ $system != --* ]] || break
      [ ! -e "$rows/$system.json" ] || others+=("$rows/$system.json")
    done
    bin/moe-lora-bench compare "$rows/moe_lora.json" "${others[@]}" peers/rows/*.json || failed=1
    ;;
  ranks)
    gpus=$(nvidia-smi -L 2>/dev/null | grep -c ^GPU)
    grids=("2 1" "1 2")
    [ "$gpus" -ge 2 ] || grids=("1 1" "2 1" "2 2")
    [ "$gpus" -lt 4 ] || grids+=("4 1" "2 2")
    for grid in "${grids[@]}"; do
      read -r tp ep <<<"$grid"
      for mode in "" --processes; do
        for full in "" --fully-sharded; do
          [ -z "$full" ] || [ "$tp" -gt 1 ] || continue
          timeout "$limit" bin/moe-lora-bench ranks --tp "$tp" --ep "$ep" $mode $full \
            --json "ranks-tp$tp-ep$ep$mode$full.json" "$@" || failed=$((failed + 1))
        done
      done
    done
    ;;
  all)
    choose
    run_tests
    run_sanitizers
    bin/moe-lora-bench gpu "$@" || failed=$((failed + 1))
    ;;
  *) sed -n '2,/^set/{s/^# \{0,1\}//;/^set/!p}' "$0" && exit 2 ;;
esac
[ $failed = 0 ] && echo "run.sh $command: ok" || { echo "run.sh $command: $failed failed"; exit 1; }
