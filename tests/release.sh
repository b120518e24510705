#!/usr/bin/env bash
# Builds sdist and wheel, installs the wheel into an empty environment, and runs a slice of the
# tests there on one backend, away from the source. `make release-check`; RELEASE_BACKEND says which.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3} backend=${RELEASE_BACKEND:-jax} folder=build/release
rm -rf dist "$folder"
mkdir -p "$folder"

$python -m venv "$folder/tools"
"$folder/tools/bin/pip" install --quiet build twine
"$folder/tools/bin/python" -m build
"$folder/tools/bin/twine" check --strict dist/*

$python -m venv "$folder/clean"
bin=$PWD/$folder/clean/bin
if [ "$backend" = torch ]; then "$bin/pip" install --quiet "$(grep '^torch==' constraints.txt)"; fi
"$bin/pip" install --quiet --constraint constraints.txt "$(ls dist/*.whl)[$backend,plot]" \
  hypothesis mpmath pytest scikit-learn scipy

# The source distribution brings the tests; its own package is taken away.
tar -xzf dist/*.tar.gz -C "$folder"
cd "$folder"/keras_lipnext-*
rm -r keras_lipnext
unset PYTHONPATH
export KERAS_BACKEND=$backend OMP_NUM_THREADS=1 TF_CPP_MIN_LOG_LEVEL=3
where=$("$bin/python" -c 'import keras_lipnext; print(keras_lipnext.__file__)')
case $where in *site-packages*) ;; *) echo "This is not the wheel: $where" && exit 1 ;; esac
"$bin/lipnext" --version
"$bin/pytest" -m "not slow" tests/losses tests/metrics tests/golden tests/test_cli.py \
  tests/certification/test_certify.py tests/certification/test_report.py tests/certification/test_page.py
echo "The wheel passes on $backend. In dist:"
ls ../../../dist
