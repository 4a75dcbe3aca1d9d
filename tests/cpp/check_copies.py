"""check_copies.py LIBRARY: libmobilemamba.so and the Python package in one process, whichever is loaded first."""

import os
import subprocess
import sys

PYTHON = "import mobilemamba"
CPP = "import sys, torch; torch.ops.load_library(sys.argv[1])"
LOGITS = """
import mobilemamba, torch
torch.manual_seed(0)
with torch.inference_mode():
    print(mobilemamba.nano(pretrained=True).eval().fuse()(torch.randn(2, 1, 28, 28)).tolist())
"""


def logits(library: str, first: str, second: str, **environment: str) -> str:
    command = [sys.executable, "-c", "\n".join([first, second, LOGITS]), library]
    done = subprocess.run(command, env={**os.environ, **environment}, cwd=os.sep, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "", done.stderr
    return done.stdout


def main(library: str) -> None:
    alone = logits(library, PYTHON, PYTHON)
    assert logits(library, PYTHON, CPP) == alone
    assert logits(library, CPP, PYTHON) == alone
    assert logits(library, PYTHON, PYTHON, LD_PRELOAD=library) == alone  # as in a program that links it


if __name__ == "__main__":
    main(sys.argv[1])
