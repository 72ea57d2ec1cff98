#!/bin/bash
# The convolutions: figures, tests, sanitizer. convolutions.sh COMMIT [LIMIT [STEP...]]
source "$(dirname "$0")/common.sh"
bench=("$PY" -m bench convolution)
# One thread each: with as many workers as cores, more would wait for one another.
tests=(env OMP_NUM_THREADS=1 "$PY" -m pytest -vv -p no:cacheprovider)

step trunks 170 "${bench[@]}" --only trunks --batch 1 8 32 256 --csv "$R/convolution_trunks.csv"
step layers 120 "${bench[@]}" --only layers --batch 1 --csv "$R/convolution_layers.csv"
step stems 120 "${bench[@]}" --only stems --batch 1 2 4 8 32 --csv "$R/convolution_stems.csv"
step endings 60 "${bench[@]}" --only endings --batch 1 2 4 8 16 32 64 256 --csv "$R/convolution_endings.csv"
step ending_trunks 60 "$PY" -m bench.convolution.ending_trunks
step timeline 60 "$PY" -m bench.convolution.timeline --trunk resnet50 --batch 1 \
  --json "$R/convolution_timeline.json" --picture "$R/convolution_timeline.png"
step tests 330 "${tests[@]}" -n 16 tests/kernels/test_convolution*.py tests/kernels/test_fused_linear*.py
step tail_tests 60 "${tests[@]}" -n 12 tests/kernels/test_decoder_tail.py tests/kernels/test_decoder_tail_native.py
step tail 60 "$PY" -m bench fused --only 'decoder layer' --batch 1 4 8 16 32 256 --all-configs --csv "$R/tail.csv"
step engine_tests 180 "${tests[@]}" -n 16 tests/inference/test_engine*.py tests/data/test_synthetic_images.py \
  tests/training/test_step.py
step fused 90 "$PY" -m bench fused --batch 1 --only 512 --all-configs --seconds 0.03 --csv "$R/fused.csv"
step replays 60 "${tests[@]}" -n 0 tests/kernels/test_convolution.py -k thousand
step past_2_31 120 "${tests[@]}" -n 1 tests/kernels/test_gpu_determinism.py -k 2_31
step sanitize 240 "$PY" tools/sanitize.py --tools memcheck racecheck --jobs 6 \
  --groups convolution-native convolution-cluster-native linear-native linear-cluster-native \
  --out "$R/sanitize"
step initcheck 200 "$PY" tools/sanitize.py --tools initcheck --groups convolution-native --shards 8 --jobs 8 \
  --out "$R/initcheck"
step initcheck_others 90 "$PY" tools/sanitize.py --tools initcheck --jobs 6 \
  --groups convolution-cluster-native linear-native linear-cluster-native --out "$R/initcheck_others"

collect() {
  grep -hE 'reached$|MISSED' "$LOGS/trunks.log" 2>/dev/null
  grep -HE '[0-9]+ (passed|failed)' "$LOGS"/{tests,tail_tests,engine_tests,replays,past_2_31}.log 2>/dev/null
  grep -HE 'nothing was found|NOT CLEAN|cannot sanitize' "$LOGS"/{sanitize,initcheck,initcheck_others}.log 2>/dev/null
  return 0
}
