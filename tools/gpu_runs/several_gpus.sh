#!/bin/bash
# Two GPUs: the same curve as one, and the scaling. several_gpus.sh COMMIT [LIMIT [STEP...]]
NEEDS_WHEELS=1
source "$(dirname "$0")/common.sh"

step topology 10 nvidia-smi topo -m
step scaling 500 "$PY" -m bench scaling --steps "${STEPS:-200}" --seconds 140 --csv "$R/scaling.csv" \
  --curves "$R/scaling_curves.csv" --output "$R/scaling"

# Weights do not fit into what comes back.
collect() {
  [[ -d $LOGS/scaling ]] && find "$LOGS/scaling" \( -name '*.safetensors' -o -name '*.pt' \) -delete
  grep -hE '^(curve|speed): ' "$LOGS/scaling.log" 2>/dev/null
  return 0
}
