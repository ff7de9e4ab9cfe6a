"""What kvkern promises, checked on a user's own machine, model and device: `kvkern check`.

The same by plain pytest, with any of its options: `pytest -p kvkern.checks.options --pyargs kvkern.checks --model=MODEL`.
"""
