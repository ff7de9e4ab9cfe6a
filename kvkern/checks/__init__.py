"""What kvkern promises, checked on a user's own machine, model and device: `kvkern check`, or `pytest --pyargs kvkern.checks`."""
