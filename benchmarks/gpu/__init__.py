"""What only a machine with a GPU can show, in one call: `python -m benchmarks.gpu BUNDLE --json FILE`."""
