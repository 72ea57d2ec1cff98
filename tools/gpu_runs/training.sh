#!/bin/bash
# Training steps, training from files, tests of steps and of interrupted runs. training.sh COMMIT [LIMIT [STEP...]]
NEEDS_WHEELS=1
source "$(dirname "$0")/common.sh"

training() { # CASE MAXSECONDS CONTENDER...: one case in a process of its own, rows in a file of its own
  step "training_$1" "$2" "$PY" -m bench training --cases "$1" --contenders "${@:3}" --csv "$R/training_$1.csv" \
    --profile "$R/kernels_$1.json"
}

# Compiling takes 50 to 70 s for each contender that is compiled.
step batch_norm 150 "$PY" -m bench batch_norm --all-configs --csv "$R/batch_norm.csv"
step adamw 60 "$PY" -m bench adamw --all-configs --csv "$R/adamw.csv"
step residual_norm 90 "$PY" -m bench residual_norm --csv "$R/residual_norm.csv"
step image_weight_gradient 60 "$PY" -m bench image_weight_gradient --all-configs \
  --csv "$R/image_weight_gradient.csv"
step max_pool 60 "$PY" -m bench max_pool --all-configs --csv "$R/max_pool.csv"
training s-r50 300 published compiled 'ours, all, not compiled' 'ours, all' ours
training l-r50 300 published compiled 'ours, all'
training l-r50-full 260 compiled 'ours, all, not compiled' 'ours, all'
# The profile of what a case takes now, without what it is held against.
for case in s-r50 l-r50; do
  step "profile_$case" 220 "$PY" -m bench training --cases $case --contenders 'ours, all, not compiled' 'ours, all' \
    --csv "$R/profile_$case.csv" --profile "$R/profile_$case.json"
done
step data 260 "$PY" -m bench data --workers 8 14 15 16 --steps 150 --csv "$R/data.csv"
step images 150 "$PY" -m bench synthetic_images --batch 64 --modes captured captured+compiled --csv "$R/images.csv" \
  --profile "$R/images.json"
step crops 60 "$PY" -m bench crops --csv "$R/crops.csv"
step losses 90 "$PY" -m bench losses --csv "$R/losses.csv"
# By itself: it starts four trainings, one after the other.
step killed 200 env OMP_NUM_THREADS=1 "$PY" -m pytest -v -p no:cacheprovider tests/training/test_interrupted.py \
  -k "killed_run and cuda"
# TESTS: some of them only.
tests="tests/training/test_step.py tests/training/test_interrupted.py tests/training/test_optimizer.py
  tests/training/test_half_weights.py tests/training/test_fused_training.py tests/kernels/test_adamw.py
  tests/kernels/test_adamw_launches.py tests/kernels/test_max_pool.py tests/kernels/test_image_weight_gradient.py
  tests/kernels/test_convolution_stem.py tests/kernels/test_render_crops.py
  tests/kernels/test_batch_norm.py tests/kernels/test_batch_norm_bits.py tests/kernels/test_batch_norm_joint.py
  tests/kernels/test_residual_norm.py
  tests/kernels/test_residual_norm_contract.py tests/kernels/test_relu_dropout.py
  tests/models/test_backbone_norms.py tests/models/test_backbone_pool.py tests/models/test_backbone_overlap.py
  tests/models/test_fused_transformer.py tests/models/test_half_matrices.py tests/data"
# shellcheck disable=SC2086 # several words
step tests 280 env OMP_NUM_THREADS=1 "$PY" -m pytest -vv -p no:cacheprovider -n 12 ${TESTS:-$tests}

collect() {
  grep -hE 'reached$|MISSED$' "$LOGS"/training_*.log 2>/dev/null
  grep -hE '[0-9]+ (passed|failed)' "$LOGS"/{killed,tests}.log 2>/dev/null
  return 0
}
