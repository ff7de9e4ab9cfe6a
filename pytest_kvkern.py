"""Makes `pytest --pyargs kvkern.checks --model MODEL` know its options: pytest reads a package's conftest.py too late for that.

A pytest plugin by entry point, so it is imported by every pytest where kvkern is installed: it lies outside the package, imports
nothing, and does nothing unless the command line names kvkern.checks.
"""


def pytest_load_initial_conftests(early_config, args):
    named = (str(arg).partition("::")[0] for arg in args)
    if any(name == "kvkern.checks" or name.startswith("kvkern.checks.") for name in named):
        early_config.pluginmanager.import_plugin("kvkern.checks.options")
