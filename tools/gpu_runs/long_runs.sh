#!/bin/bash
# Trains FastMETRO-S or -L with ResNet-50 on synthetic people. long_runs.sh COMMIT LIMIT train_s-r50|train_l-r50
# TOTAL=1400: seconds of stepping, over as many calls as they take: a call goes on where the one before stopped, as long
# as out/ is there. AGAIN=1 begins anew. MORE='...' replaces the options of both, the same in each call of a run.
# Weights stay there: they do not fit into what comes back.
NEEDS_WHEELS=1
source "$(dirname "$0")/common.sh"
RUNS=out/long_runs
[[ ${AGAIN:-} ]] && rm -rf "$RUNS"
mkdir -p "$RUNS"
LAST=50 # seconds for the checkpoint, in the last call for the report on 1,000 images, for curves and packing
read -ra more <<<"${MORE:---fused --compile-model --capture-step}"

train() { # NAME MODEL
  local resume=()
  [[ -f $RUNS/$1/checkpoint.pt ]] && resume=(--resume)
  # A checkpoint of half a gigabyte every 500 steps would count against --total-seconds; one is written at the end.
  step "train_$1" $(($(left) - 15)) "$PY" -m fastmetro train configs/synthetic.yaml --model "$2" \
    --output "$RUNS/$1" --total-seconds "${TOTAL:-1400}" --max-seconds $(($(left) - LAST)) --steps 400000 \
    --save-every 1000000 --log-every 250 --eval-every 2500 --commit "$COMMIT" "${more[@]}" "${resume[@]}"
}

collect() {
  local name
  for name in s-r50 l-r50; do
    [[ -d $RUNS/$name ]] || continue
    mkdir -p "$LOGS/$name"
    cp -r "$RUNS/$name"/{log.csv,report.json,tensorboard} "$LOGS/$name/" 2>/dev/null
    tail -n 1 "$RUNS/$name/log.csv" | cut -c1-160
    [[ -f $RUNS/$name/report.json ]] || echo "$name: no report.json, the run did not come to its end yet"
  done
  return 0
}

[[ $ONLY == *' train_s-r50 '* ]] && train s-r50 fastmetro-s
[[ $ONLY == *' train_l-r50 '* ]] && train l-r50 fastmetro-l
DONE+='train_s-r50 train_l-r50 '
[[ $ONLY == *' train_'* ]] || { echo "name a run: train_s-r50 or train_l-r50"; exit 2; }

curves=()
for name in s-r50 l-r50; do
  [[ -f $RUNS/$name/log.csv ]] && curves+=("$name=$RUNS/$name/log.csv")
done
ONLY=' ' # whatever was named
((${#curves[@]})) && step curves 20 "$PY" -m bench curves "${curves[@]}" --values loss pa_mpjpe --out "$R/curves.png" --csv "$R/curves.csv"
