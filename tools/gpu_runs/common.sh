# Sourced by the scripts beside it: SCRIPT COMMIT [LIMIT [STEP...]]. See README.md.
#
# COMMIT goes into every result (FASTMETRO_COMMIT: where they run there need not be a repository). LIMIT: seconds for all
# of it, packing included. STEPs: run only these. DRY=1 runs nothing and prints what would run. Before `source`, a
# script may set NEEDS_WHEELS=1; after it, it may define `collect`, which is called once at the end to copy results
# into $LOGS.
# shellcheck shell=bash
set -u
COMMIT=${1:?usage: $0 COMMIT [LIMIT [STEP...]]}
LIMIT=${2:-590}
ONLY=" ${*:3} "
case $LIMIT in '' | *[!0-9]*) echo "LIMIT must be whole seconds, got '$LIMIT'" >&2; exit 2 ;; esac
cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit 2

PY=${PY:-python3}
OUT=${OUT:-$PWD/out}
R=out/gpu_run # relative: command lines are written into results, where no place of a machine belongs
LOGS=$PWD/$R
CACHE=$PWD/out/cache
DRY=${DRY:-}
FAILED=0
JOB= # process id of the step that runs
DONE=' ' # names of steps: $ONLY may name one that is not there
export FASTMETRO_COMMIT=$COMMIT PYTHONUNBUFFERED=1
export TORCHINDUCTOR_CACHE_DIR=$CACHE/inductor TRITON_CACHE_DIR=$CACHE/triton
rm -rf "$LOGS"
mkdir -p "$LOGS" "$OUT" "$CACHE"

left() { echo $((LIMIT - SECONDS)); }

collect() { :; }

note() { # NAME TEXT: one line, on the screen and in steps.txt
  printf '%-22s %s\n' "$1" "$2" | tee -a "$LOGS/steps.txt"
}

step() { # NAME MAXSECONDS COMMAND...: its exit status; 125 where it was skipped for want of time, 0 where not asked for
  local name=$1 most=$2 now seconds start took status said
  shift 2
  DONE+="$name "
  [[ $ONLY == *[!\ ]* && $ONLY != *" $name "* ]] && return 0
  now=$(left)
  if ((now < 15 || most < 1)); then
    note "$name" "SKIPPED, $now s left, at most $most s asked for"
    FAILED=$((FAILED + 1))
    return 125
  fi
  seconds=$((now - 8 < most ? now - 8 : most))
  if [[ $DRY ]]; then
    note "$name" "would run for $seconds s: $*"
    return 0
  fi
  start=$SECONDS
  # In the background, so that a signal to this script is not kept waiting until the step ends.
  timeout -k 4 "$seconds" "$@" >"$LOGS/$name.log" 2>&1 &
  JOB=$!
  wait "$JOB"
  status=$?
  JOB=
  took=$((SECONDS - start))
  said="exit $status, $took s"
  ((status == 124 || status == 137)) && said+=", STOPPED at its limit of $seconds s"
  note "$name" "$said"
  if ((status)); then
    FAILED=$((FAILED + 1))
    tr '\r' '\n' <"$LOGS/$name.log" | tail -n 12 | cut -c1-200 | sed 's/^/    /'
  fi
  echo "---- $said" >>"$LOGS/$name.log"
  return $status
}

finish() {
  local code=$? name size
  trap - EXIT INT TERM
  [[ $JOB ]] && kill "$JOB" 2>/dev/null && note stopped "by a signal, after $SECONDS s"
  collect
  for name in $ONLY; do
    [[ $DONE == *" $name "* ]] || { echo "there is no step '$name'; there are:$DONE"; FAILED=$((FAILED + 1)); }
  done
  rm -f "$OUT"/o.tgz*
  tar -C "$PWD/out" -czf "$OUT/o.tgz" gpu_run
  size=$(stat -c %s "$OUT/o.tgz")
  if ((size > 15 << 20)); then # what comes back is at most 8 files of 16 MiB
    split -d -b 15M "$OUT/o.tgz" "$OUT/o.tgz." && rm "$OUT/o.tgz"
    echo "o.tgz was too large for one file: cat o.tgz.* | tar xz"
  fi
  echo "---- $(basename "$0") at $COMMIT: $FAILED not done or failed, $SECONDS s of $LIMIT, $((size >> 10)) KiB of results"
  cat "$LOGS/steps.txt" 2>/dev/null
  # A cache of compiled code, for .carry/cache.tgz: last, because it may take longer than is left.
  [[ ${KEEP_CACHE:-} && $(left) -gt 3 ]] && {
    timeout -k 1 "$(($(left) - 2))" tar -C "$PWD/out" -cf - cache | gzip -1 >"$OUT/cache.tgz" || rm -f "$OUT/cache.tgz"
    (($(stat -c %s "$OUT/cache.tgz" 2>/dev/null || echo 0) < 16 << 20)) || rm -f "$OUT/cache.tgz"
  }
  ((FAILED && code != 2 && code < 129)) && code=1 # not that of the last step
  exit "$code"
}
trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

if [[ -f .carry/cache.tgz ]]; then tar -C "$PWD/out" -xzf .carry/cache.tgz || exit 2; fi
if [[ -z $DRY && -f .carry/native.tgz ]]; then tar -xzf .carry/native.tgz || exit 2; fi
if compgen -G '.whl/*.whl' >/dev/null; then
  if [[ -z $DRY ]]; then
    "$PY" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$PWD/out/site" .whl/*.whl \
      || { echo "the wheels do not install"; exit 2; }
    export PYTHONPATH=$PWD/out/site${PYTHONPATH:+:$PYTHONPATH}
  fi
elif [[ ${NEEDS_WHEELS:-} ]]; then
  echo "no .whl/*.whl: run tools/gpu_runs/wheels.sh, and carry .whl"
  exit 2
fi
if [[ -z $DRY ]]; then
  nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.mem,temperature.gpu,power.draw --format=csv,noheader \
    >"$LOGS/gpu.txt" 2>&1
  # Without the extension the engine would run on the library alone, and its figures would be of something else.
  timeout -k 4 90 "$PY" - >"$LOGS/native.log" 2>&1 <<'PYTHON'
import torch
from fastmetro_kernels import info
from fastmetro_kernels.convolution import native
print(info.report())
why = native.reasons(torch.device("cuda"), torch.float16)
raise SystemExit("; ".join(why) if why else 0)
PYTHON
  status=$?
  if ((status)); then
    echo "the native kernels do not run here (exit $status):"
    tail -n 40 "$LOGS/native.log"
    exit 2
  fi
  note native "extension runs, $SECONDS s since the start"
fi
