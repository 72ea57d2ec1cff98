#!/bin/bash
# Trains S and L with ResNet-50 on synthetic people, each for half of the time. long_runs.sh COMMIT [LIMIT [STEP...]]
# MORE='--capture-step' adds options to both runs. Weights stay there: they do not fit into what comes back.
NEEDS_WHEELS=1
source "$(dirname "$0")/common.sh"
RUNS=out/long_runs
rm -rf "$RUNS"
mkdir -p "$RUNS"
AROUND=${AROUND:-60} # seconds of a run that are no stepping: start, evaluations, export, report
LAST=25              # curves and packing

train() { # NAME MODEL SECONDS
  local more=()
  read -ra more <<<"${MORE:-}"
  # A checkpoint of half a gigabyte every 500 steps would count against --total-seconds; one is written at the end.
  step "train_$1" $(($3 + 2 * AROUND)) "$PY" -m fastmetro train configs/synthetic.yaml --model "$2" \
    --output "$RUNS/$1" --total-seconds "$3" --steps 200000 --save-every 1000000 --eval-every 1000 \
    --commit "$COMMIT" "${more[@]}"
}

collect() {
  local name
  for name in s-r50 l-r50; do
    [[ -d $RUNS/$name ]] || continue
    mkdir -p "$LOGS/$name"
    cp -r "$RUNS/$name"/{log.csv,report.json,tensorboard} "$LOGS/$name/" 2>/dev/null
    [[ -f $RUNS/$name/report.json ]] || echo "$name: no report.json, the run did not come to its end"
  done
  return 0
}

each=$((($(left) - LAST) / 2 - AROUND))
# A run alone gets what two would have.
[[ $ONLY == *[!\ ]* && ($ONLY != *' train_s-r50 '* || $ONLY != *' train_l-r50 '*) ]] && each=$(($(left) - LAST - AROUND))
((each >= 20)) || { echo "LIMIT $LIMIT leaves $each s for each run"; exit 2; }
begin=$SECONDS
train s-r50 fastmetro-s "$each"
if [[ -f $RUNS/s-r50/report.json ]]; then # what the first needed beside its stepping, and a sixth more
  around=$(((SECONDS - begin - each) * 7 / 6 + 2))
  rest=$(($(left) - LAST - around))
  ((rest < each)) && each=$rest
fi
((each >= 20)) || { echo "only $each s are left for L"; exit 1; }
train l-r50 fastmetro-l "$each"

curves=()
for name in s-r50 l-r50; do
  [[ -f $RUNS/$name/log.csv ]] && curves+=("$name=$RUNS/$name/log.csv")
done
if ((${#curves[@]})) || [[ $DRY ]]; then
  step curves 20 "$PY" -m bench curves "${curves[@]}" --values loss pa_mpjpe --out "$R/curves.png" --csv "$R/curves.csv"
fi
