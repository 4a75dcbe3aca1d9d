"""tools/kernel_resources.py: what it reads in the log of a build."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
if not (ROOT / "tools").is_dir():
    pytest.skip("not in a checkout: no tools/", allow_module_level=True)
sys.path.insert(0, str(ROOT / "tools"))

import kernel_resources  # noqa: E402

LOG = """\
mobilemamba: building for torch 2.14.1+cu130, CUDA 13.0 for sm_90 (TORCH_CUDA_ARCH_LIST)
  [1/3] c++ -MMD -c -c /root/build/units/cuda.cpp -o /root/cuda.o
  [2/3] nvcc -MD -c -c /root/csrc/cuda/gate.cu -o /root/csrc/cuda/gate.o -std=c++20
  ptxas info    : 0 bytes gmem
  ptxas info    : Compiling entry function '_ZN11mobilemamba4cuda4gateIfEEvi' for 'sm_90'
  ptxas info    : Function properties for _ZN11mobilemamba4cuda4gateIfEEvi
      0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
  ptxas info    : Used 48 registers, used 1 barriers, 16 bytes smem
  [3/3] nvcc -MD -c -c /root/csrc/cuda/haar.cu -o /root/csrc/cuda/haar.o -std=c++20
  ptxas info    : Compiling entry function '_ZN11mobilemamba4cuda4haarIdEEvi' for 'sm_90'
  ptxas info    : Function properties for _ZN11mobilemamba4cuda4haarIdEEvi
      8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
  ptxas info    : Used 32 registers
"""


def test_reports_in_the_log_of_a_build() -> None:
    found = {name: kernel_resources.kernels_in(text) for name, text in kernel_resources.reports_of(LOG).items()}
    facts = ("name", "registers", "stack", "stores", "loads", "shared", "barriers")
    assert {name: [tuple(kernel[fact] for fact in facts) for kernel in kernels] for name, kernels in found.items()} == {
        "gate.cu": [("gate<float>", "48", "0", "0", "0", "16", "1")],
        "haar.cu": [("haar<double>", "32", "8", "4", "12", "0", None)],
    }


def test_a_log_without_reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "log"
    log.write_text(LOG)
    monkeypatch.setattr(kernel_resources.toolkit, "find_nvcc", lambda environ: Path("nvcc"))
    monkeypatch.setattr(
        kernel_resources.toolkit,
        "ask_nvcc",
        lambda nvcc: kernel_resources.toolkit.Toolkit(Path("/cuda"), "13.0", ("9.0",), (), ()),
    )
    monkeypatch.setattr(sys, "argv", ["kernel_resources.py", "--check", "--log", str(log)])
    with pytest.raises(SystemExit, match=r"log has no report of ptxas on .*scan_backward\.cu"):
        kernel_resources.main()


def test_small_spills_are_allowed_where_they_are_known() -> None:
    def spills(name: str, stores: int) -> bool:
        return kernel_resources.spills({"name": name, "stores": str(stores)})

    assert not spills("gate_forward_kernel<float>", 0)
    assert spills("gate_forward_kernel<float>", 4)
    assert not spills("scan_forward_kernel<float, true>", 8)
    assert spills("scan_forward_kernel<float, true>", 12)
