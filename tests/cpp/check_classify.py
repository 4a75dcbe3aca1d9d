"""check_classify.py DATA CLASSIFY...: mobilemamba-classify prints what Python prints, and one line for bad input."""

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

DATA = Path(sys.argv[1])
EXAMPLES = Path(__file__).parents[2] / "examples"
DRESS, BAG = EXAMPLES / "dress.png", EXAMPLES / "bag.png"


def main() -> None:
    for program in map(Path, sys.argv[2:]):
        for model in (DATA / "nano-float32.pt", DATA / "nano-float32.pt2"):
            check_names(program, model)
        check_refusals(program)


def run(program: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    suppressions = DATA / "leaks"
    suppressions.write_text("leak:mz_zip_reader_init\n")  # torch leaks it for a damaged archive
    environment = {**os.environ, "LSAN_OPTIONS": f"suppressions={suppressions}:print_suppressions=0"}
    command = [program, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, errors="replace")


def check_names(program: Path, model: Path) -> None:
    """The names and scores are those of `mobilemamba classify`."""
    command = [sys.executable, "-m", "mobilemamba", "classify", str(DRESS), str(BAG)]
    expected = subprocess.run(command, cwd=DATA, capture_output=True, text=True, check=True).stdout.split()
    done = run(program, model, DRESS, BAG, "--threads", "2", "--benchmark", "3")
    assert done.returncode == 0, done
    assert done.stdout.split()[: len(expected)] == expected, (done, expected)
    assert re.search(r"^3 runs, batch 1, 2 threads: median \d+\.\d\d ms", done.stdout, re.M), done.stdout


def check_refusals(program: Path) -> None:
    model = DATA / "nano-float32.pt"
    broken = write_broken(model)
    for arguments, message in (
        ([DATA / "missing.pt", DRESS], "no such model file"),
        ([broken["text"], DRESS], "not a readable model file"),
        ([broken["empty"], DRESS], "not a readable model file"),
        ([broken["cut"], DRESS], "not a readable model file"),
        ([broken["damaged"], DRESS], "not a readable model file"),
        ([broken["newer"], DRESS], "format version 2 is newer than the 1 that this program reads"),
        ([broken["newer.pt2"], DRESS], "format version 2 is newer than the 1 that this program reads"),
        ([broken["other"], DRESS], "expected a file of `mobilemamba export`"),
        ([model, DRESS, "--device", "cuda"], "has no CUDA"),
        ([model, DRESS, "--device", "tpu"], "--device: expected cpu or cuda, got 'tpu'"),
        ([model, DRESS, "--topk"], "unknown option --topk; usage: "),
        ([model, DRESS, "-x"], "unknown option -x; usage: "),
        ([model, DRESS, "--threads", "0"], "expected a number of at least 1, got '0'"),
        ([model, DRESS, "--threads"], "expected a value"),
        ([model], "usage: "),
    ):
        done = run(program, *arguments)
        assert done.returncode == 2, (arguments, done)
        assert done.stdout == "", (arguments, done)
        assert done.stderr.startswith("mobilemamba-classify: error: "), (arguments, done)
        assert done.stderr.count("\n") == 1, (arguments, done)
        assert message in done.stderr, (arguments, done)
    done = run(program, "--help")
    assert (done.returncode, done.stderr) == (0, ""), done
    assert done.stdout.startswith("usage: mobilemamba-classify MODEL IMAGE..."), done
    check_bad_images(program, model, broken)


def check_bad_images(program: Path, model: Path, broken: dict[str, Path]) -> None:
    """The other images have their results; each bad one has a line, and the exit code is 1."""
    bad = [DATA / "missing.png", broken["text"], broken["cut.png"], broken["cut.jpg"]]
    done = run(program, model, bad[0], DRESS, *bad[1:], BAG)
    assert done.returncode == 1, done
    assert done.stdout.splitlines()[::6] == [str(DRESS), str(BAG)], done
    messages = ("no such image file", "expected a JPEG or PNG image", "not a readable image", "not a readable image")
    for line, path, message in zip(done.stderr.splitlines(), bad, messages, strict=True):
        assert line.startswith(f"mobilemamba-classify: error: {path}: {message}"), done


def write_broken(model: Path) -> dict[str, Path]:
    whole, photo = model.read_bytes(), (DATA / "progressive.jpg").read_bytes()
    at = whole.index(b"constants.pkl")  # first before the record, then in the directory
    contents = {
        "text": b"not a model, not an image\n",
        "empty": b"",
        "cut": whole[: len(whole) // 2],
        "damaged": whole[: at + 13] + bytes(200) + whole[at + 213 :],
        "cut.png": DRESS.read_bytes()[:200],
        "cut.jpg": photo[: len(photo) // 2],
    }
    paths = {name: DATA / f"broken-{name}" for name in (*contents, "newer", "newer.pt2", "other")}
    for name, content in contents.items():
        paths[name].write_bytes(content)
    rewrite(model, paths["newer"], {"extra/mobilemamba.version": b"2"})
    rewrite(model.with_suffix(".pt2"), paths["newer.pt2"], {"extra/mobilemamba.version": b"2"})
    rewrite(model, paths["other"], {"extra/mobilemamba.version": None})
    return paths


def rewrite(source: Path, target: Path, changes: dict[str, bytes | None]) -> None:
    """A copy of the archive with some records replaced, or removed if None."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for entry in old.infolist():
            content = changes.get(entry.filename.partition("/")[2], old.read(entry))
            if content is not None:
                new.writestr(entry.filename, content)


if __name__ == "__main__":
    main()
