#!/bin/bash
# Tiles settled in whole trunks and behind the backbone, and where their blocks settle. tiles.sh COMMIT [LIMIT [STEP...]]
source "$(dirname "$0")/common.sh"
TABLE=out/measured.json # the name goes into the table's record
cp fastmetro_kernels/convolution/measured.json "$TABLE"
conv=("$PY" -m bench convolution --tune "$TABLE")
timeline=("$PY" -m bench.convolution.timeline --trunk resnet50 --batch 1)

step linear_s 80 "$PY" -m bench.fused.place --model fastmetro-s --seconds 30 --json "$R/linear_s.json"
step linear_l 130 "$PY" -m bench.fused.place --model fastmetro-l --seconds 60 --json "$R/linear_l.json"
step placing 150 "${conv[@]}" --only placing --batch 1 --trunk resnet50
step spreading 60 "${conv[@]}" --only spreading --batch 1
step alone 40 "${timeline[@]}" --json "$R/timeline.json" --picture "$R/timeline.png"
step together 40 "${timeline[@]}" --together --json "$R/timeline_together.json"

collect() {
  cp "$TABLE" "$LOGS/"
  grep -hE ' before, | us with the tiles' "$LOGS"/{linear_s,linear_l,placing,spreading}.log 2>/dev/null
  return 0
}
