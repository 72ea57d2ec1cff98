#!/bin/bash
# Two GPUs: the same curve as one, and the scaling. several_gpus.sh COMMIT [LIMIT [STEP...]]
# RATE=3e-5: the curves' learning rate, at which one GPU repeats its own curve; at 1e-4 it does not.
NEEDS_WHEELS=1
source "$(dirname "$0")/common.sh"

step topology 10 nvidia-smi topo -m
step curve 250 "$PY" -m bench scaling --parts curve --learning-rate "${RATE:-3e-5}" --steps "${STEPS:-300}" --seconds 100 \
  --csv "$R/curve.csv" --curves "$R/scaling_curves.csv" --output "$R/curve"
step speed 400 "$PY" -m bench scaling --parts speed --steps 200 --seconds 140 --csv "$R/speed.csv" --output "$R/speed"

# Weights do not fit into what comes back.
collect() {
  find "$LOGS" \( -name '*.safetensors' -o -name '*.pt' \) -delete
  grep -hE '^(curve|speed): ' "$LOGS"/{curve,speed}.log 2>/dev/null
  return 0
}
