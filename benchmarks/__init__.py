"""fastkd against eager PyTorch and torch.compile, side by side in one run.

pytest benchmarks             every case on every provider, the report, and the results as JSON
pytest benchmarks --smoke     the same on tiny inputs in seconds: does it all still run and agree
python -m benchmarks.report benchmarks/results/<processor>/cpu.json [--update-readme]
bash benchmarks/on_gpu.sh OUT  tests, checks and timings on a machine with a GPU

Needs pytest, pytest-benchmark and, for torch.compile, a C++ compiler. Run it on an idle machine.
"""
