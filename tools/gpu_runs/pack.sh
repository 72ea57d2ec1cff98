#!/bin/bash
# After `make build`: packs the native libraries into .carry/native.tgz, for a machine with a GPU but without nvcc.
set -u
cd "$(dirname "$0")/../.." || exit 2
shopt -s nullglob
libraries=(fastmetro_kernels/*.so)
((${#libraries[@]})) || { echo "no fastmetro_kernels/*.so: make build" >&2; exit 1; }
[[ " ${libraries[*]} " == *_native_cuda* ]] || { echo "no CUDA library among ${libraries[*]}" >&2; exit 1; }
for library in "${libraries[@]}"; do
  kinds=(-name '*.cpp' -o -name '*.h')
  [[ $library == *_native_cuda* ]] && kinds=(-name '*.cu' -o -name '*.cuh' -o -name '*.h')
  newer=$(find csrc -type f \( "${kinds[@]}" \) -newer "$library" | head -n 3 | tr '\n' ' ')
  [[ $newer ]] && echo "WARNING: newer than $library: $newer- make build?"
done
mkdir -p .carry
tar -cf - "${libraries[@]}" | gzip -9 >.carry/native.tgz.new || exit 1
mv .carry/native.tgz.new .carry/native.tgz
ls -l "${libraries[@]}" .carry/native.tgz

bytes() { tr '\n' '\0' | du -cb --files0-from=- 2>/dev/null | tail -n 1 | cut -f1; }
listed=$(git ls-files --cached --others --exclude-standard | bytes)
carried=0
for folder in .carry .whl; do
  [[ -d $folder ]] && carried=$((carried + $(find "$folder" -type f | bytes)))
done
printf 'travels: %d KiB of the repository + %d KiB of .carry and .whl\n' $((listed >> 10)) $((carried >> 10))
dirty=$(git diff --quiet HEAD || echo +)
echo "commit: $(git rev-parse --short=12 HEAD)$dirty${dirty:+ (tracked files differ)}"
