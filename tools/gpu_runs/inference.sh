#!/bin/bash
# Whole networks against published and tuned, then equality. inference.sh COMMIT [LIMIT [STEP...]]
source "$(dirname "$0")/common.sh"

fps() { # CASE MAXSECONDS [OPTION...]: one case in a process of its own, rows in a file of its own
  step "fps_$1" "$2" "$PY" -m bench fps --cases "$1" "${@:3}" --csv "$R/fps_$1.csv"
}

# At one image also the engine on the library's convolutions.
fps s-r50-1 120 --library
fps l-r50-1 120 --library
fps l-h64-1 170 --library
fps s-r50-32 120
fps s-r50-256 150
fps l-r50-256 160
step equality 180 "$PY" -m bench equality --csv "$R/equality.csv"

# All rows in one file beside the single ones, and the targets on the screen.
collect() {
  local files=()
  mapfile -t files < <(find "$LOGS" -name 'fps_?-*.csv' | sort)
  ((${#files[@]})) || return 0
  awk 'FNR > 1 || NR == 1' "${files[@]}" >"$LOGS/fps_all.csv"
  grep -hE 'reached$|MISSED$' "$LOGS"/fps_*.log
  [[ -f $LOGS/equality.log ]] && grep -E 'limits$' "$LOGS/equality.log"
  return 0
}
