#!/bin/bash
# Trains FastMETRO-S and -L with ResNet-50 on synthetic people. long_runs.sh COMMIT LIMIT [train_s-r50] [train_l-r50]
# Both at once where there are two GPUs, one on each; with one GPU name one of them.
# TOTAL=1400: seconds of stepping, over as many calls as they take: a call goes on where the one before stopped, as long
# as out/ is there. AGAIN=1 begins anew. MORE='...' replaces the options of both, the same in each call of a run;
# MORE_S='...', MORE_L='...' come behind them. Weights stay there: they do not fit into what comes back.
NEEDS_WHEELS=1
source "$(dirname "$0")/common.sh"
RUNS=out/long_runs
[[ ${AGAIN:-} ]] && rm -rf "$RUNS"
mkdir -p "$RUNS"
LAST=40 # seconds for the checkpoint, in the last call for the report on 1,000 images, for curves and packing
read -ra more <<<"${MORE:---fused --compile-model --compile-images --capture-step}"
read -ra more_s <<<"${MORE_S:-}"
read -ra more_l <<<"${MORE_L:-}"
gpus=$(nvidia-smi --list-gpus 2>/dev/null | wc -l)

train() { # GPU NAME MODEL OPTION...
  local resume=()
  [[ -f $RUNS/$2/checkpoint.pt ]] && resume=(--resume)
  # A checkpoint of half a gigabyte every 500 steps takes time; a few are for a run that breaks off.
  CUDA_VISIBLE_DEVICES=$1 step "train_$2" $(($(left) - 15)) "$PY" -m fastmetro train configs/synthetic.yaml \
    --model "$3" --output "$RUNS/$2" --total-seconds "${TOTAL:-1400}" --max-seconds $(($(left) - LAST)) \
    --steps 400000 --save-every 7500 --log-every 100 --eval-every 2500 --commit "$COMMIT" \
    "${more[@]}" "${@:4}" "${resume[@]}"
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

jobs=()
both=
if [[ $ONLY != *[!\ ]* || ($ONLY == *' train_s-r50 '* && $ONLY == *' train_l-r50 '*) ]]; then
  both=1
  ((gpus > 1)) || [[ $DRY ]] || { echo "there is one GPU: name one of train_s-r50 and train_l-r50"; exit 2; }
fi
if [[ $both || $ONLY == *' train_s-r50 '* ]]; then
  train 0 s-r50 fastmetro-s "${more_s[@]}" &
  jobs+=($!)
fi
if [[ $both || $ONLY == *' train_l-r50 '* ]]; then
  train $((gpus > 1)) l-r50 fastmetro-l "${more_l[@]}" &
  jobs+=($!)
fi
DONE+='train_s-r50 train_l-r50 ' # they are known here, not in the processes above
for job in "${jobs[@]}"; do wait "$job" || FAILED=$((FAILED + 1)); done

curves=()
for name in s-r50 l-r50; do
  [[ -f $RUNS/$name/log.csv ]] && curves+=("$name=$RUNS/$name/log.csv")
done
ONLY=' ' # whatever was named
((${#curves[@]})) && step curves 20 "$PY" -m bench curves "${curves[@]}" --values loss pa_mpjpe --out "$R/curves.png" --csv "$R/curves.csv"
