"""Decisions of setup.py, its builds, and the report of an installation."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
import torch

from sgmim_fast import _native, backends, env

ROOT = Path(__file__).parents[1]
HAS_COMPILER = any(map(shutil.which, ("c++", "g++", "clang++")))
needs_compiler = pytest.mark.skipif(not HAS_COMPILER, reason="needs a C++ compiler")


def run(
    *command: str | Path, cwd: Path = ROOT, check: bool = True, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Runs a command with only the given ones of the build's variables. Output and errors are returned together."""
    ours = re.compile(r"SGMIM_FAST_|CUDA_HOME|CUDA_PATH|CXX|TORCH_CUDA_ARCH_LIST|PYTHONPATH")
    environment = {name: value for name, value in os.environ.items() if not ours.match(name)} | variables
    done = subprocess.run(
        command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert done.returncode == 0 or not check, done.stdout
    return done


def planned(folder: Path, **variables: str) -> tuple[dict[str, dict[str, str]], str]:
    """Returns the build info that setup.py writes, and its output, without compiling anything."""
    done = run(sys.executable, "setup.py", "-q", "build_py", "--build-lib", folder, **variables)
    return json.loads((folder / "sgmim_fast" / "_build_info.json").read_text()), done.stdout


def tool(folder: Path, name: str, script: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)
    return folder / name


def toolkit(folder: Path, release: str) -> Path:
    """Creates a folder that looks like a CUDA toolkit of that release."""
    answers = f'case "$1" in --version) echo "release {release}, V{release}.1";; *) echo sm_80; echo sm_90;; esac'
    tool(folder / "bin", "nvcc", answers)
    return folder


def our_cuda() -> str:
    if torch.version.cuda is None:
        pytest.skip("needs a torch built with CUDA")
    return torch.version.cuda


@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        ({"SGMIM_FAST_NO_EXT": "1"}, "SGMIM_FAST_NO_EXT was set"),
        ({"CXX": "no-such-compiler"}, "no C++ compiler: CXX=no-such-compiler is not found"),
        ({"PATH": "/nowhere"}, "no C++ compiler is found (c++, g++ or clang++); install one"),
    ],
)
def test_without_a_compiler_pure_python_is_installed(tmp_path, variables, reason):
    info, output = planned(tmp_path, **variables)
    assert info == {"cpu": {"skipped": reason}, "cuda": {"skipped": reason}}
    assert [line for line in output.splitlines() if line.startswith("sgmim_fast:")] == [
        f"sgmim_fast: no native library is built: {reason}"
    ]


@needs_compiler
def test_cuda_is_left_out_with_a_reason(tmp_path):
    def reason(**variables: str) -> str:
        info, output = planned(tmp_path, **variables)
        assert info["cpu"]["compiler"]
        assert f"sgmim_fast: the CUDA library is not built: {info['cuda']['skipped']}" in output.splitlines()
        return info["cuda"]["skipped"]

    assert reason(SGMIM_FAST_NO_CUDA="1") == "SGMIM_FAST_NO_CUDA was set"
    assert reason(CUDA_HOME=str(tmp_path / "gone")) == f"CUDA_HOME={tmp_path / 'gone'} has no bin/nvcc"
    broken = tool(tmp_path / "broken" / "bin", "nvcc", "exit 1")
    assert reason(CUDA_PATH=str(tmp_path / "broken")) == f"{broken} --version does not run; repair the CUDA toolkit"
    old = toolkit(tmp_path / "old", "7.5")
    assert reason(CUDA_HOME=str(old)) == (
        f"{old}/bin/nvcc is of CUDA 7.5, torch of {our_cuda()}; "
        f"point CUDA_HOME to a CUDA {our_cuda().partition('.')[0]} toolkit"
    )


WITHOUT_NVCC = """
import os, runpy, sys
isfile = os.path.isfile
os.path.isfile = lambda path: "nvcc" not in str(path) and isfile(path)
sys.argv[0] = "setup.py"
runpy.run_path("setup.py", run_name="__main__")
"""


@needs_compiler
def test_no_toolkit_anywhere_is_one_line(tmp_path):
    """The usual folders, in which this machine may have a toolkit, are not searched either."""
    compiler = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))))
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / Path(compiler).name).symlink_to(compiler)
    command = [sys.executable, "-c", WITHOUT_NVCC, "-q", "build_py", "--build-lib", tmp_path]
    done = run(*command, PATH=str(tmp_path / "bin"))
    reason = "no CUDA toolkit is found (CUDA_HOME, nvcc on PATH, /usr/local/cuda); install one"
    assert [line for line in done.stdout.splitlines() if line.startswith("sgmim_fast:")] == [
        f"sgmim_fast: the CUDA library is not built: {reason}"
    ]
    assert "Traceback" not in done.stdout
    info = json.loads((tmp_path / "sgmim_fast" / "_build_info.json").read_text())
    assert info["cuda"] == {"skipped": reason} and info["cpu"]["compiler"]


@needs_compiler
@pytest.mark.parametrize("wanted", ["sm_90", "9", "9.0+ptx", "hopper"])
def test_an_architecture_that_is_none_is_named(tmp_path, wanted):
    """The error is reported before anything is compiled, without a traceback."""
    home = toolkit(tmp_path / "toolkit", our_cuda())
    build = ["setup.py", "-q", "build_ext", "--build-lib", tmp_path, "--build-temp", tmp_path / "objects"]
    done = run(sys.executable, *build, check=False, CUDA_HOME=str(home), TORCH_CUDA_ARCH_LIST=f"8.0;{wanted}")
    assert done.returncode == 1 and "Traceback" not in done.stdout and "compiled" not in done.stdout
    expected = f"error: TORCH_CUDA_ARCH_LIST has '{wanted}'; expected numbers such as 9.0 or 9.0+PTX"
    assert done.stdout.splitlines()[-1] == expected


@needs_compiler
def test_cuda_is_planned_whatever_the_folder_of_nvcc(tmp_path):
    """The toolkit is on PATH behind a wrapper script. No GPU is queried; unknown architectures are omitted."""
    release = our_cuda().partition(".")[0] + ".9"
    home = toolkit(tmp_path / "somewhere", release)
    wrapper = tool(tmp_path / "elsewhere", "nvcc", f'exec {home}/bin/nvcc "$@"')
    info, _ = planned(tmp_path, PATH=f"{wrapper.parent}:{os.environ['PATH']}")
    assert info["cuda"] == {"nvcc": str(wrapper), "toolkit": release, "architectures": "8.0;9.0+PTX"}
    info, _ = planned(tmp_path, CUDA_HOME=str(home), TORCH_CUDA_ARCH_LIST="9.0a 12.0+PTX")
    assert info["cuda"] == {"nvcc": f"{home}/bin/nvcc", "toolkit": release, "architectures": "9.0a;12.0+PTX"}


@needs_compiler
@pytest.mark.parametrize(
    ("smi", "expected"),
    [
        ("echo 9.0; echo 9.0", "9.0"),
        ("echo 9.0; echo 8.0", "8.0;9.0"),
        ("echo 7.5", "8.0;9.0+PTX"),  # older than the kernels require
        ("echo 12.0", "8.0;9.0+PTX"),  # unknown to the toolkit
        ("echo 'No devices were found'; exit 6", "8.0;9.0+PTX"),
    ],
)
def test_an_editable_installation_is_for_the_gpus_of_the_machine(tmp_path, smi, expected):
    """A wheel is built for all architectures."""
    home = toolkit(tmp_path / "toolkit", our_cuda())
    tool(tmp_path / "bin", "nvidia-smi", smi)
    program = (
        "import runpy, sys, setuptools; setuptools.setup = lambda **_: None; sys.argv = ['setup.py', *sys.argv[1:]]"
    )
    program += "; print(runpy.run_path('setup.py')['PLAN']['cuda']['architectures'])"
    variables = {"CUDA_HOME": str(home), "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    for command in (["editable_wheel"], ["build_ext", "--inplace"]):
        assert run(sys.executable, "-c", program, *command, **variables).stdout.strip() == expected
    assert run(sys.executable, "-c", program, "bdist_wheel", **variables).stdout.strip() == "8.0;9.0+PTX"
    done = run(sys.executable, "-c", program, "editable_wheel", TORCH_CUDA_ARCH_LIST="10.0", **variables)
    assert done.stdout.strip() == "10.0"


def test_build_info_agrees_with_the_files():
    info = _native.build_info()
    if not info:
        pytest.skip("sgmim_fast is not installed here")
    for part, name in (("cpu", "_C"), ("cuda", "_C_cuda")):
        assert ("skipped" in info[part]) == (_native._find(name) is None)


def test_cuda_library_loads_without_a_gpu():
    if _native._find("_C_cuda") is None:
        pytest.skip(_native.build_info().get("cuda", {}).get("skipped", "not built"))
    if mismatch := _native._cuda_mismatch():
        pytest.skip(mismatch[1])
    assert _native.load_cuda() == (True, "")
    ops = torch.ops.sgmim_fast_cuda
    assert [arg.name for arg in ops.gather_patches.default._schema.arguments if arg.is_write] == ["out"]
    written = [arg.name for arg in ops.gather_patches_backward.default._schema.arguments if arg.is_write]
    assert written == ["inverse", "grad_input"]
    kernels = ("selective_mask", "standardize_structure", "attention", "attention_backward")
    assert all(hasattr(ops, name) for name in kernels)
    assert ops.attention_memory(2, 128, False) <= 99 << 10  # shared memory per block from compute capability 8.0 on


@pytest.mark.parametrize(
    ("architectures", "capability", "expected"),
    [
        ("8.0;9.0;10.0+PTX", (7, 5), False),
        ("8.0;9.0;10.0+PTX", (8, 0), True),
        ("8.0;9.0;10.0+PTX", (8, 9), True),
        ("8.0;9.0;10.0+PTX", (12, 0), True),
        ("8.0;9.0;10.0", (12, 0), False),
        ("8.6", (8, 0), False),
        ("9.0a", (9, 0), True),
        ("9.0a+PTX", (10, 0), False),
        ("10.0f", (10, 3), True),
        ("8.0+PTX", (9, 0), True),
    ],
)
def test_gpus_that_the_built_architectures_cover(architectures, capability, expected):
    assert _native.covers(architectures, capability) == expected


def test_a_gpu_without_code_is_named(monkeypatch):
    monkeypatch.setattr(_native, "build_info", lambda: {"cuda": {"architectures": "8.0;9.0+PTX"}})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert _native.uncovered_gpu() == ""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert _native.uncovered_gpu() == (
        "the GPU has compute capability 7.5, the CUDA library is built for 8.0;9.0+PTX: "
        "install sgmim_fast again with TORCH_CUDA_ARCH_LIST=7.5"
    )


def test_a_load_error_is_kept(tmp_path, monkeypatch):
    library = tmp_path / "library.so"
    library.write_text("not a library")
    monkeypatch.setattr(_native, "_loaded", {})
    monkeypatch.setattr(_native, "_errors", {})
    monkeypatch.setenv("SGMIM_FAST_LIBRARY", str(library))
    usable, reason = _native.load_cpu()
    assert not usable
    assert reason.startswith(f"{library} could not be loaded: ")
    assert isinstance(_native.load_error("cpu"), OSError)
    library.unlink()
    assert _native.load_cpu() == (usable, reason)  # loaded once


def test_env_reports_every_backend_and_why_one_is_missing(capsys):
    report = env.report()
    assert report["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert list(report["backends"]) == list(backends.available())
    for name, (usable, reason) in backends.available().items():
        assert report["backends"][name] == ("available" if usable else f"missing: {reason}")
        assert usable or reason
    env.main()
    printed = capsys.readouterr().out
    assert all(text in printed for facts in report.values() for text in facts.values())


def test_import_needs_no_triton_compiler_or_gpu(tmp_path):
    program = "import sys; sys.modules['triton'] = None; import sgmim_fast.kernels; print(sgmim_fast.__path__[0])"
    done = run(sys.executable, "-c", program, cwd=tmp_path, PATH="/nowhere", CUDA_VISIBLE_DEVICES="")
    assert Path(done.stdout.splitlines()[-1], "_native.py").is_file()


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    """Copies the source tree, so that builds do not change it, with the object files of its installation. Those that
    are older than their sources are recompiled."""
    ignored = shutil.ignore_patterns(".git", ".*cache", ".hypothesis", "build", "dist", "*.egg-info", "*.so", "*.json")
    copy = Path(shutil.copytree(ROOT, tmp_path_factory.mktemp("sources") / "sgmim_fast", ignore=ignored))
    if (ROOT / "build" / "objects").exists():
        shutil.copytree(ROOT / "build" / "objects", copy / "build" / "objects")
    return copy


def wheel(sources: Path, folder: Path, **variables: str) -> Path:
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder, "."]
    run(*pip, cwd=sources, **variables)
    return next(folder.glob("*.whl"))


def unpacked(archive: Path, folder: Path) -> Path:
    with zipfile.ZipFile(archive) as files:
        files.extractall(folder)
    return folder


@pytest.mark.slow
@needs_compiler
def test_wheel_works_elsewhere(sources, tmp_path):
    archive = wheel(sources, tmp_path / "wheels", SGMIM_FAST_NO_CUDA="1")
    assert "-cp310-abi3-" in archive.name
    folder = unpacked(archive, tmp_path / "site")
    assert {path.name for path in folder.iterdir() if path.suffix != ".dist-info"} == {"sgmim_fast"}
    packaged = {str(path.relative_to(folder)) for path in folder.rglob("*.py")}
    expected = {str(path.relative_to(ROOT)) for path in (ROOT / "sgmim_fast").rglob("*.py")}
    expected |= {f"sgmim_fast/{path.relative_to(ROOT)}" for path in (ROOT / "kernels").rglob("*.py")}
    assert packaged == expected
    program = "import sgmim_fast.kernels; from sgmim_fast import _native; print(_native.__file__, _native.load_cpu())"
    done = run(sys.executable, "-c", program, cwd=tmp_path, PYTHONPATH=str(folder))
    assert done.stdout.splitlines()[-1] == f"{folder}/sgmim_fast/_native.py (True, '')"


@pytest.mark.slow
def test_pure_python_wheel_says_why(sources, tmp_path):
    archive = wheel(sources, tmp_path / "wheels", SGMIM_FAST_NO_EXT="1")
    assert archive.name.endswith("-py3-none-any.whl")
    folder = unpacked(archive, tmp_path / "site")
    done = run(sys.executable, "-m", "sgmim_fast.env", cwd=tmp_path, PYTHONPATH=str(folder))
    assert re.search(r"^  cpu +missing: SGMIM_FAST_NO_EXT was set$", done.stdout, re.MULTILINE)
    assert re.search(r"^  torch +available$", done.stdout, re.MULTILINE)


@pytest.mark.slow
@needs_compiler
def test_editable_install_in_a_new_environment(sources, tmp_path):
    python = tmp_path / "environment" / "bin" / "python"
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "environment")
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").stdout.strip())
    # pip, torch and the other packages come from the environment in which the tests run.
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib"))
    run(
        python, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "-e", sources, SGMIM_FAST_NO_CUDA="1"
    )
    program = "import sgmim_fast.kernels as k; from sgmim_fast import _native; print(k.__file__, _native.load_cpu())"
    done = run(python, "-c", program, cwd=tmp_path)
    assert done.stdout.splitlines()[-1] == f"{sources}/kernels/__init__.py (True, '')"
    objects = {path: path.stat().st_mtime for path in (sources / "build").rglob("*.o")}
    again = ("install", "-v", "--no-deps", "--no-build-isolation", "-e", sources)
    done = run(python, "-m", "pip", *again, SGMIM_FAST_NO_CUDA="1")
    assert "sgmim_fast: compiled" not in done.stdout, "nothing has changed, so nothing is compiled again"
    assert objects and objects == {path: path.stat().st_mtime for path in (sources / "build").rglob("*.o")}
    later = max(objects.values()) + 1  # independent of the clock
    os.utime(sources / "csrc" / "cpu" / "isa.cpp", (later, later))
    done = run(python, "-m", "pip", *again, SGMIM_FAST_NO_CUDA="1")
    changed = [path.name for path, before in objects.items() if path.stat().st_mtime != before]
    assert changed == ["isa.o"], done.stdout


@pytest.mark.slow
@needs_compiler
def test_sources_compile_without_warnings(sources, tmp_path):
    """Checks the compiler log of every object file of both libraries."""
    done = run(sys.executable, "setup.py", "-q", "build_ext", "--build-lib", tmp_path, cwd=sources)
    assert "warning" not in re.sub(r"SetuptoolsWarning", "", done.stdout)
    libraries = {path.name.partition(".")[0] for path in (tmp_path / "sgmim_fast").glob("*.so")}
    kinds = {"_C": "cpu/*.cpp", "_C_cuda": "cuda/*.cu"}
    assert "_C" in libraries
    headers = [path.stat().st_mtime for path in sources.glob("csrc/**/*.h")]
    for source in (path for library in libraries for path in sources.glob(f"csrc/{kinds[library]}")):
        logs = sources.glob(f"build/objects/*/{source.relative_to(sources).with_suffix('.log')}")
        latest = [log for log in logs if log.stat().st_mtime >= max(*headers, source.stat().st_mtime)]
        assert latest and not any("warning" in log.read_text() for log in latest), source.name
    if "_C_cuda" in libraries:
        report = run(sys.executable, "benchmarks/cuda_report.py", cwd=sources)
        *kernels, total = report.stdout.splitlines()[1:]
        assert total == f"{len(kernels)} kernels, 0 that spill registers"
        pairs = {tuple(re.match(r"(.*\S) +(sm_\d+) ", line).groups()) for line in kernels}
        names, archs = map(set, zip(*pairs, strict=True))
        assert len(pairs) == len(kernels) == len(names) * len(archs), "every architecture has every kernel"


PTXAS = """\
ptxas info    : 28 bytes gmem
ptxas info    : Compiling entry function '_Z6kernelPf' for 'sm_90'
ptxas info    : Function properties for _Z6kernelPf
    8 bytes stack frame, {stores} bytes spill stores, {stores} bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 256 bytes smem
"""


@pytest.mark.parametrize("stores", [0, 4])
def test_cuda_report_fails_where_registers_spill(tmp_path, stores):
    log = tmp_path / "ptxas.log"
    log.write_text(PTXAS.format(stores=stores))
    done = run(sys.executable, "benchmarks/cuda_report.py", log, check=False)
    assert done.returncode == (stores > 0)
    assert done.stdout.splitlines()[1].split()[1:] == ["sm_90", "40", str(2 * stores), "8", "256"]


@pytest.mark.slow
@needs_compiler
def test_sources_that_do_not_compile_are_an_error(sources, tmp_path):
    broken = shutil.copytree(sources, tmp_path / "broken")
    (broken / "csrc" / "cpu" / "isa.cpp").write_text("#error broken here\n")
    done = run(sys.executable, "setup.py", "-q", "build_ext", cwd=broken, check=False, SGMIM_FAST_NO_CUDA="1")
    assert done.returncode == 1
    assert "#error broken here" in done.stdout
    assert "Traceback" not in done.stdout
    assert re.fullmatch(
        r"error: \S+ could not compile csrc/cpu/isa\.cpp, see above; SGMIM_FAST_NO_EXT=1 installs without it",
        done.stdout.splitlines()[-1],
    )
