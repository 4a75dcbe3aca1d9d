"""How the suite runs: which tests (``--full``), on which device (``--device``), and in how many processes.

Where pytest-xdist is installed, several processes share a run of whole folders. A run of some files or some tests
stays in one process, because each further process would first load torch; so does a run on another device, which the
processes would share. ``-n`` overrules both.
"""

import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hypothesis
import pytest

CHECKOUT = Path(__file__).resolve().parents[1]
MAX_PROCESSES = 8  # a process holds torch and the models under test, about 1 GB
EXAMPLES, FULL_EXAMPLES = 15, 60  # that hypothesis draws for a test


def prefer_the_installed_package() -> None:
    """Takes the checkout off ``sys.path``, where ``python -m pytest`` puts it, if mobilemamba is found without it.

    The sources in a checkout have no compiled library unless it was built in place.
    """
    before = sys.path[:]
    sys.path[:] = [entry for entry in before if Path(entry).resolve() != CHECKOUT]
    if importlib.util.find_spec("mobilemamba") is None:
        sys.path[:] = before


prefer_the_installed_package()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="device of the operators and models under test (default: cpu)")
    parser.addoption("--full", action="store_true", help="run all tests, those that are marked full too")


def processes(config: pytest.Config) -> int:
    """How many processes run the tests, the command line's options and arguments considered."""
    option = config.option
    if not config.pluginmanager.hasplugin("xdist"):
        return 1
    if option.numprocesses is not None or option.dist != "no" or option.tx:
        return option.numprocesses or len(option.tx) or 1
    some_tests = option.keyword or option.markexpr or getattr(option, "lf", False) or getattr(option, "stepwise", False)
    some_files = any("::" in argument or argument.endswith(".py") for argument in config.args)
    one_terminal = option.usepdb or option.trace or option.capture == "no" or option.collectonly
    if some_tests or some_files or one_terminal or option.device != "cpu":
        return 1
    return min(len(os.sched_getaffinity(0)), MAX_PROCESSES)


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads its options
def pytest_cmdline_main(config: pytest.Config) -> None:
    if hasattr(config, "workerinput") or (count := processes(config)) == 1:
        return
    # Torch's threads would compete with the other processes.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if config.option.numprocesses is None and config.option.dist == "no":
        config.option.numprocesses, config.option.dist = count, "worksteal"


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "full: runs with --full only")
    config.addinivalue_line("markers", "alone: runs while no other process tests the GPU")
    examples = FULL_EXAMPLES if config.option.full else EXAMPLES
    hypothesis.settings.register_profile("mobilemamba", max_examples=examples, deadline=None, derandomize=True)
    hypothesis.settings.load_profile("mobilemamba")
    if config.option.device != "cpu":
        import torch

        torch.set_default_device(config.option.device)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False  # float32 is float32


def pytest_report_header(config: pytest.Config) -> str:
    which = "all" if config.option.full else "without those marked full (--full runs all)"
    return f"tests: {which}, in {processes(config)} process(es)"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    full = [] if config.option.full else [item for item in items if item.get_closest_marker("full")]
    if full:
        config.hook.pytest_deselected(items=full)
        items[:] = [item for item in items if item not in full]


# Under pytest-xdist only the workers collect: these two hooks bring the number of deselected tests to the last line.


def pytest_deselected(items: list[pytest.Item]) -> None:
    output = getattr(items[0].config, "workeroutput", None)
    if output is not None:
        output["deselected"] = output.get("deselected", 0) + len(items)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    terminal = node.config.pluginmanager.getplugin("terminalreporter")
    count = getattr(node, "workeroutput", {}).get("deselected", 0)  # the same in every worker: each collects all
    if terminal is not None and count:
        terminal.stats["deselected"] = [SimpleNamespace()] * count  # counted, never read


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For small models that run beside other tests: two threads wait for each other there."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
