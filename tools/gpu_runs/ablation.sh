#!/bin/bash
# The network without its parts: three variants, three seeds, as many steps as fit. ablation.sh COMMIT [LIMIT [STEP...]]
# JOBS=3 runs at once, over all GPUs; SEEDS='0 1 2'. STEPS=8000: so many in each run, else as many as fit into LIMIT; in
# several calls, each with some of the seeds, all need the same.
NEEDS_WHEELS=1
source "$(dirname "$0")/common.sh"
RUNS=out/ablation
rm -rf "$RUNS"
mkdir -p "$RUNS"
read -ra seeds <<<"${SEEDS:-0 1 2}"

collect() {
  local file name
  for file in "$RUNS"/*.txt; do
    [[ -f $file ]] || continue
    name=$(basename "$file" .txt)
    mkdir -p "$LOGS/runs/$name"
    cp "$file" "$RUNS/$name"/{log.csv,report.json} "$LOGS/runs/$name/" 2>/dev/null
  done
  sed -n '/^variant/,$p' "$LOGS/ablation.log" 2>/dev/null
  return 0
}

# A tenth is kept back beside what --seconds keeps back itself: a trial on two busy CPU cores planned 130 s, which became
# 200. Rows are written seed by seed, so what is cut off is the last seed.
length=(--seconds $((($(left) - 28) * 9 / 10)))
[[ ${STEPS:-} ]] && length=(--steps "$STEPS")
step ablation $(($(left) - 20)) "$PY" -m bench ablation --seeds "${seeds[@]}" --jobs "${JOBS:-3}" "${length[@]}" \
  --csv "$R/ablation.csv" --curves "$R/ablation_curves.csv" --output "$RUNS"
if [[ -f $LOGS/ablation_curves.csv ]]; then
  step curves 20 "$PY" -m bench curves "$R/ablation_curves.csv" --values loss --out "$R/ablation_curves.png"
fi
