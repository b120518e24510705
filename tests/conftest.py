"""Shared set-up. What imports a backend, for seconds, is left to the processes that run tests."""

import compiling  # noqa: F401  before what imports a backend


def pytest_configure(config):
    starts_workers = config.getoption("numprocesses", None) and not hasattr(config, "workerinput")
    if not starts_workers:
        config.pluginmanager.import_plugin("workers")
