#!/usr/bin/env bash
# The tests that compare numbers, by file.
for name in kernels model contract rlp generate evals elastic elastic_runs widen muon train bench; do
    file="tests/test_$name.py"
    [ -e "$file" ] && echo "$file"
done
