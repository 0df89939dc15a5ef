"""fastkd against everything one would pick instead, side by side in one run.

python -m benchmarks            measures; run again, it goes on where it stopped
python -m benchmarks.report     draws: README.md, plots, tables
python -m benchmarks --smoke    every case on tiny inputs: does it all still run
pytest benchmarks [--smoke]     the same cases as tests, which check what each provider computes
bash benchmarks/on_gpu.sh OUT   all that a GPU has to show, on a machine that has one

Needs tqdm; torch.compile a C++ compiler, the plots matplotlib, the tests pytest-benchmark.
Liger-Kernel, TRL and vLLM's speculators take part where they are installed. Measure on an idle
machine.
"""
