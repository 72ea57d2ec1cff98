#!/bin/bash
# Downloads into .whl what a machine without a package index may lack for `fastmetro train` and the tests of training: tyro with
# its needs (docstring_parser, typeguard; typing_extensions comes with torch), trimesh and simplejpeg (need numpy).
# Versions are those of constraints.txt, and for the needs those that pip chose in .venv.
set -u
cd "$(dirname "$0")/../.." || exit 2
pin() { sed -n "s/^$1==//p" constraints.txt; }
wheels=("tyro==$(pin tyro)" docstring_parser==0.18.0 typeguard==4.6.1 "trimesh==$(pin trimesh)" "simplejpeg==$(pin simplejpeg)")
rm -rf .whl
.venv/bin/python -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
  --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
  -d .whl "${wheels[@]}" || exit 1
ls -l .whl
for wheel in .whl/*.whl; do
  echo "$wheel needs:" "$(unzip -p "$wheel" '*/METADATA' | grep ^Requires-Dist | grep -v 'extra ==' | tr '\n' ' ')"
done
