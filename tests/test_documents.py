"""The documents are true: their code runs, their commands parse or run, their links and paths lead somewhere.

A command that no check here knows is a failure, and so is a fenced block of an unknown language. CI runs the commands
of docs/cpp.md for real; tests/cpp runs its program.
"""

import argparse
import importlib
import importlib.util
import inspect
import os
import re
import runpy
import shlex
import sys
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import NamedTuple, NoReturn
from unittest import mock

import pytest
import torch
import torch.distributed.elastic.multiprocessing.api
from PIL import Image
from test_rooms import ROOMS

import mobilemamba
from mobilemamba import cli, downstream, weights, zoo
from mobilemamba.data import shapes

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
DOCUMENTS = [
    *PAGES,
    *(ROOT / name for name in ("CONTRIBUTING.md", "CHANGELOG.md", "examples/README.md")),
    *(ROOT / name for name in ("benchmarks/NOTES.md", "benchmarks/results/TODO.md")),
]
LANGUAGES = {"bibtex", "cmake", "console", "cpp", "kotlin", "python", "sh", "swift", "text"}
SOURCE_SUFFIXES = {".cpp", ".cu", ".cuh", ".h", ".py", ".toml"}


def name_of(path: object) -> str:
    return str(path.relative_to(ROOT)) if isinstance(path, Path) else str(path)


def blocks(document: Path, *languages: str) -> list[str]:
    """The contents of the fenced blocks in these languages."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", document.read_text(), re.M | re.S)
    return [content for language, content in found if language in languages]


def prose(document: Path) -> str:
    return re.sub(r"^```.*?^```$", "", document.read_text(), flags=re.M | re.S)


def spans(document: Path) -> list[str]:
    """What the prose has in backquotes."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose(document))]


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_blocks_have_known_languages(document: Path) -> None:
    fences = re.findall(r"^```(.*)$", document.read_text(), re.M)
    assert set(fences[::2]) <= LANGUAGES
    assert set(fences[1::2]) <= {""}


# Code


#: What a block that matches the pattern needs, beside torch.
OPTIONAL = (
    (r"\b(downstream|torchvision)\b", "torchvision"),
    (r"\bmobilemamba\.hub\b", "huggingface_hub"),
    *(
        (rf"^(import|from) {name}\b", name)
        for name in ("accelerate", "lightning", "timm", "torchmetrics", "transformers")
    ),
)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("document", [page for page in PAGES if blocks(page, "python")], ids=name_of)
def test_python_runs(document: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load = weights.load_pretrained

    def load_what_is_here(model: mobilemamba.MobileMamba, name: str, *rest: object) -> None:
        if name == "nano":  # the others are downloads
            load(model, name, *rest)

    monkeypatch.setattr(zoo.weights, "load_pretrained", load_what_is_here)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    if document.name == "downstream.md" and importlib.util.find_spec("torchvision"):
        make_detector(tmp_path)
    if document.name == "integrations.md":
        (tmp_path / "mobilemamba").symlink_to(ROOT)
        monkeypatch.setenv("MOBILEMAMBA_WEIGHTS", str(tmp_path))
        distilled = mobilemamba.s6(distillation=True).state_dict()
        torch.save(distilled, tmp_path / weights.entry("s6", distilled=True).file_name)
    names: dict[str, object] = {}
    for block in blocks(document, "python"):
        needed = [name for pattern, name in OPTIONAL if re.search(pattern, block, re.M)]
        if not all(map(importlib.util.find_spec, needed)):
            continue
        exec(compile(block, str(document), "exec"), names)
    if document.name == "README.md":
        assert tuple(names["logits"].shape) == (1, 1000)
        assert [tuple(m.shape[1:]) for m in names["maps"]] == [(192, 14, 14), (384, 7, 7), (448, 4, 4)]
    if document.name == "training.md":
        assert names["accuracy"] > 0.4  # 0.59 to 0.72 for three seeds, 0.1 is chance
        assert weights.read("digits.pt").preset == "nano"
    if document.name == "derivatives.md":
        assert names["logits"].shape == (3, 2, 10)
        assert all(len(gradient) == 2 for gradient in names["per_sample"].values())
    if document.name == "integrations.md" and "trainer" in names:
        assert names["trainer"].global_step == 2
    if document.name == "integrations.md" and "top1" in names:
        assert 0 <= names["top1"] <= 1
    if document.name == "deployment.md":
        assert tuple(names["logits"].shape) == (3, 10)
        assert names["difference"] < 0.1


def make_detector(folder: Path) -> None:
    """The files of the example: a detector that learned nothing, and a photograph."""
    options = {"backbone_options": {"in_chans": 3, "patch_strides": (2, 2, 2)}, "min_size": 48, "pyramid_channels": 8}
    model = downstream.create_model("retinanet", "nano", 3, **options)
    stored = downstream.DownstreamCheckpoint(model.state_dict(), "retinanet", "nano", 3, options, ["cat", "dog"])
    (folder / "runs/mine").mkdir(parents=True)
    downstream.save_model(folder / "runs/mine/model.pt", stored)
    Image.new("RGB", (64, 48)).save(folder / "photo.jpg")


def test_cpp_is_the_example() -> None:
    """tests/cpp compiles and runs it."""
    programs = [block for document in DOCUMENTS for block in blocks(document, "cpp")]
    assert programs == [(ROOT / "examples/cpp/snippet.cpp").read_text()]


def test_cmake_is_as_in_the_example() -> None:
    example = (ROOT / "examples/cpp/CMakeLists.txt").read_text()
    lines = [line for document in DOCUMENTS for block in blocks(document, "cmake") for line in block.splitlines()]
    assert lines
    for line in lines:
        assert line.replace("(app ", "(snippet ") in example, line


# Commands


class Command(NamedTuple):
    """One command of a document, with the output that the document shows below it."""

    document: Path
    words: tuple[str, ...]
    output: str = ""

    def __str__(self) -> str:
        return f"{name_of(self.document)}: {shlex.join(self.words)}"


def split(line: str) -> Iterator[tuple[str, ...]]:
    """The commands of a line that are joined by ``&&``."""
    words: list[str] = []
    for word in [*shlex.split(line, comments=True), "&&"]:
        if word != "&&":
            words.append(word)
        elif words:
            yield tuple(words)
            words = []


def commands(document: Path) -> Iterator[Command]:
    for block in blocks(document, "sh"):
        for line in re.sub(r"(\\|(&&))\n", r"\2 ", block).splitlines():
            yield from (Command(document, words) for words in split(line))
    for block in blocks(document, "console"):
        for part in re.split(r"^\$ ", block, flags=re.M)[1:]:
            line, _, output = part.partition("\n")
            *earlier, last = split(line)
            yield from (Command(document, words) for words in earlier)
            yield Command(document, last, output)
    for span in spans(document):
        if span.split()[0] in CHECKS and " " in span:
            yield from (Command(document, words) for words in split(span))


def check_export(command: Command, request: pytest.FixtureRequest) -> None:
    """The build reads the variables."""
    sources = "".join(path.read_text() for path in (ROOT / "build_backend").glob("*.py"))
    for word in command.words[1:]:
        assert f'"{word.partition("=")[0]}"' in sources, word


def check_mobilemamba(command: Command, request: pytest.FixtureRequest) -> None:
    """Parses the command, and runs it where it is cheap and needs nothing that is not here."""
    arguments = list(command.words[1:])
    if len(arguments) == 1 and arguments != ["info"]:  # the prose names the command
        arguments.append("--help")
    if "--help" in arguments:
        with pytest.raises(SystemExit, match=r"^0$"):
            cli.make_parser().parse_args(arguments)
        return
    args = cli.make_parser().parse_args(arguments)
    mine = getattr(args, "checkpoint", None) or getattr(args, "model", None) not in (None, "nano")
    if args.command == "info" or (args.command in ("classify", "export") and not mine):
        if getattr(args, "format", None) in ("aoti", "onnx", "executorch", "coreml", "litert"):
            return  # a minute or more: tests/cpp, tests/test_export.py and tests/test_runtimes.py write such files
        folder, capture = request.getfixturevalue("tmp_path"), request.getfixturevalue("capsys")
        (folder / "examples").symlink_to(ROOT / "examples")
        request.getfixturevalue("monkeypatch").chdir(folder)
        assert cli.main(arguments) == 0
        printed = capture.readouterr().out
        if command.output:
            assert without_figures(printed) == without_figures(command.output)
            assert figures(printed) == pytest.approx(figures(command.output), abs=0.2)


def without_figures(text: str) -> str:
    return re.sub(r"[\d.]+%", "%", text).strip()


def figures(text: str) -> list[float]:
    return [float(figure) for figure in re.findall(r"([\d.]+)%", text)]


class ParsedError(Exception):
    """Raised in place of what a program does after its arguments are read."""


def check_python(command: Command, request: pytest.FixtureRequest) -> None:
    """Parses the arguments of the script as the script does."""
    script, *arguments = command.words[1:]
    if script == "-c":  # starts a script of timm, which is not here
        assert arguments[0].startswith("import sys, runpy, mobilemamba.timm; ")
        return
    if script == "-m":
        if arguments[0] == "mobilemamba.data.shapes":
            shapes.make_parser().parse_args(arguments[1:] or ["DIR"])
            return
        assert arguments == ["pytest"] or arguments[0] == "build"
        return
    if script.startswith("examples/serve/"):
        pytest.importorskip("fastapi", reason="the extra serve is not installed")
    path = ROOT / script
    parse_args = argparse.ArgumentParser.parse_args

    def parse_and_stop(parser: argparse.ArgumentParser, *words: object) -> NoReturn:
        parse_args(parser, *words)
        raise ParsedError

    before = set(sys.modules)
    with (
        mock.patch.object(sys, "argv", [str(path), *arguments]),
        mock.patch.object(sys, "path", [str(path.parent), *sys.path]),
        mock.patch.object(argparse.ArgumentParser, "parse_args", parse_and_stop),
        pytest.raises(ParsedError),
    ):
        runpy.run_path(str(path), run_name="__main__")
    for name in set(sys.modules) - before:  # the script's neighbours have short names
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(path.parent)):
            del sys.modules[name]


def check_torchrun(command: Command, request: pytest.FixtureRequest) -> None:
    """The module that it runs is this package; its arguments are checked."""
    module = command.words.index("-m")
    assert command.words[module + 1] == "mobilemamba"
    assert [word for word in command.words[1:module] if word.startswith("-")] == ["--nproc-per-node"]
    check_mobilemamba(Command(command.document, command.words[module + 1 :]), request)


def check_pip(command: Command, request: pytest.FixtureRequest) -> None:
    assert command.words[1] == "install"
    extras = pyproject_extras()
    for word in command.words[2:]:
        if match := re.fullmatch(r"\.\[(.*)\]", word):
            assert set(match[1].split(",")) <= set(extras), word


def pyproject_extras() -> dict[str, list[str]]:
    text = (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    return {name: re.findall(r'"([\w-]+)', values) for name, values in re.findall(r"^(\w+) = \[(.*)\]", text, re.M)}


def check_pytest(command: Command, request: pytest.FixtureRequest) -> None:
    for word in command.words[1:]:
        if word.startswith("--"):
            request.config.getoption(word.partition("=")[0])  # raises for an option that there is not
    check_paths(command, request)


def check_linter(command: Command, request: pytest.FixtureRequest) -> None:
    assert command.words[0] in pyproject_extras()["lint"]
    check_paths(command, request)


def check_cmake(command: Command, request: pytest.FixtureRequest) -> None:
    check_paths(command, request)
    for option, value in zip(command.words, command.words[1:], strict=False):
        if option == "-S":
            assert (ROOT / value / "CMakeLists.txt").is_file()


def check_paths(command: Command, request: pytest.FixtureRequest) -> None:
    """What looks like a path of the repository is one."""
    for word in command.words:
        check_path(word)


def check_example(command: Command, request: pytest.FixtureRequest) -> None:
    """A program that the commands above it built."""
    program = Path(command.words[0]).name
    assert f"add_executable({program} " in (ROOT / "examples/cpp/CMakeLists.txt").read_text()
    check_paths(command, request)


def known(command: Command, request: pytest.FixtureRequest) -> None:
    """Leads out of the repository, or into it: there is nothing to check."""


CHECKS: dict[str, Callable[[Command, pytest.FixtureRequest], None]] = {
    ".ci/run": check_paths,
    "apt": known,
    "build/examples/mobilemamba-classify": check_example,
    "cd": known,
    "clang-format": check_linter,
    "cmake": check_cmake,
    "ctest": check_cmake,
    "export": check_export,
    "git": known,
    "mobilemamba": check_mobilemamba,
    "pip": check_pip,
    "pytest": check_pytest,
    "python": check_python,
    "ruff": check_linter,
    "sphinx-build": check_paths,
    "torchrun": check_torchrun,
}
ALL_COMMANDS = [command for document in DOCUMENTS for command in commands(document)]
#: Each command once, as it stands first: blocks come before the prose.
COMMANDS = list({command.words: command for command in reversed(ALL_COMMANDS)}.values())[::-1]


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_commands(command: Command, request: pytest.FixtureRequest) -> None:
    assert command.words[0] in CHECKS, f"no check knows the command {command}"
    CHECKS[command.words[0]](command, request)


def test_the_commands_that_users_start_with_are_there() -> None:
    readme = [command.words for command in COMMANDS if command.document == ROOT / "README.md"]
    assert ("pip", "install", ".[test]") in readme
    assert ("pytest",) in readme
    assert any(command.output for command in COMMANDS if command.words[:2] == ("mobilemamba", "classify"))


# Links, paths, names


def anchors(document: Path) -> set[str]:
    """GitHub's names of the headings."""
    headings = re.findall(r"^#+ (.*)$", prose(document), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(document)):
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        linked = (document.parent / path).resolve() if path else document
        assert linked.is_relative_to(ROOT), target
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), target


def check_path(text: str) -> None:
    """Where ``text`` is a path of the repository or a file name of its sources, with ``{a,b}`` and ``*``, it exists."""
    if not re.fullmatch(r"[\w.*{},/-]+", text):
        return
    for path in expanded(text):
        if path.endswith("/run") or "/" in path:
            first = path.split("/")[0]
            if first not in ("", ".", "..", "build") and (ROOT / first).is_dir():
                assert list(ROOT.glob(path.rstrip("/"))), f"{path}: no such file in the repository"
        elif re.fullmatch(r"[\w*]+", Path(path).stem) and Path(path).suffix in SOURCE_SUFFIXES:
            assert any(list(ROOT.glob(f"{folder}/**/{path}")) for folder in SOURCES) or (ROOT / path).exists(), path


SOURCES = ("benchmarks", "build_backend", "csrc", "examples", "mobilemamba", "tests", "tools")


def expanded(text: str) -> list[str]:
    """``a.{h,cpp}`` as the shell expands it."""
    parts = re.split(r"\{([^{}]*)\}", text)
    return [
        "".join(choice) for choice in product(*(part.split(",") if i % 2 else [part] for i, part in enumerate(parts)))
    ]


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_paths_exist(document: Path) -> None:
    for span in spans(document):
        check_path(span)


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_variables_are_read(document: Path) -> None:
    """Environment variables and CMake options that a document names occur in the code."""
    files = [
        path for folder in ("build_backend", "mobilemamba", "tests", "tools") for path in (ROOT / folder).rglob("*.py")
    ]
    code = "".join(path.read_text() for path in [*files, ROOT / "CMakeLists.txt"])
    torchrun = inspect.getsource(torch.distributed.elastic.multiprocessing.api)
    for span in spans(document):
        if match := re.fullmatch(r"(?:-D)?([A-Z]+(?:_[A-Z]+)+)(?:=.*)?", span):
            assert match[1] in code + torchrun, f"{match[1]}: nothing reads it"


def test_moved_modules_are_where_the_changelog_says() -> None:
    moved = re.findall(r"^\| `(mobilemamba\.[\w.]+)` \| `(mobilemamba\.[\w.]+)` \|", prose(ROOT / "CHANGELOG.md"), re.M)
    assert moved
    for _, name in moved:
        importlib.import_module(name)


# The pictures of the README


def picture(folder: str) -> list[str]:
    """The entries of the tree of ``folder``, from the top down."""
    (tree,) = (block for block in blocks(ROOT / "README.md", "text") if block.startswith(f"{folder}/\n"))
    return [line.split()[0].rstrip("/") for line in tree.splitlines()[1:]]


def test_picture_of_the_rooms() -> None:
    assert [Path(entry).stem for entry in picture("mobilemamba")] == list(ROOMS)


def test_picture_of_the_layers() -> None:
    layers = picture("csrc")
    assert sorted(layers) == sorted(os.listdir(ROOT / "csrc"))
    for path in (ROOT / "csrc").rglob("*.*"):
        layer = path.relative_to(ROOT / "csrc").parts[0]
        for included in re.findall(r'^#include "(.*)"', path.read_text(), re.M):
            other = included.split("/")[0]
            if other in layers:
                assert layers.index(other) >= layers.index(layer), f"{path} includes {included}, a layer above it"
                assert {layer, other} != {"cpu", "cuda"}, f"{path} includes {included}"
