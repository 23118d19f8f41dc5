"""Speed, measured: `python -m benchmarks [NAME ...]` writes `docs/performance.md`.

Nothing here asserts a speed: figures depend on the machine, so they are written down
beside their goals, with the command and the machine that made them.
"""
