"""Builds the native libraries of sgmim_fast; everything declarative is in pyproject.toml.

``sgmim_fast/_C``       csrc/cpu/*.cpp; needs a C++17 compiler (gcc or clang)
``sgmim_fast/_C_cuda``  csrc/cuda/*.cu; needs a CUDA toolkit too, of the major version that torch is built for

Both use the LibTorch stable ABI and no Python C API, so one binary works with every Python and every torch from 2.10
on; ``torch.ops.load_library`` loads them. This script calls the compilers directly and does not import torch. It writes
which library is left out, and why, to ``sgmim_fast/_build_info.json``, which ``python -m sgmim_fast.env`` reads.

Environment variables:
SGMIM_FAST_NO_EXT=1     build nothing, install pure Python
SGMIM_FAST_NO_CUDA=1    leave the CUDA library out
SGMIM_FAST_SANITIZE=1   CPU library with AddressSanitizer and UBSan (=thread: with ThreadSanitizer), no CUDA library.
                        Build it into a folder of its own:
                        SGMIM_FAST_SANITIZE=1 python setup.py build_ext --build-lib DIR --build-temp DIR/objects;
                        to use it, preload libasan.so and set SGMIM_FAST_LIBRARY=DIR/sgmim_fast/_C.abi3.so
CXX, CXXFLAGS, LDFLAGS  C++ compiler (default: the first of c++, g++, clang++), and additional flags
CUDA_HOME, CUDA_PATH    the toolkit (default: nvcc on PATH, which may be a wrapper script, then /usr/local/cuda*)
TORCH_CUDA_ARCH_LIST    default "8.0;9.0;10.0+PTX" without what the toolkit does not know; for an editable installation
                        only the architectures of the GPUs that nvidia-smi lists
MAX_JOBS                number of compilers that run in parallel (default: number of cores)

Objects of an earlier build are reused if their sources, the headers, the flags and torch have not changed.
`pip install -v` shows what is compiled.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError

HEADERS = glob("csrc/**/*.h", recursive=True)
# Version 2.10, a byte each for major, minor, patch, ...: hides whatever torch 2.10 does not have.
FLAGS = ["-std=c++17", "-DTORCH_TARGET_VERSION=0x020a000000000000", "-Icsrc"]


def is_set(name: str) -> bool:
    return os.environ.get(name, "") not in ("", "0")


SANITIZERS = "thread" if os.environ.get("SGMIM_FAST_SANITIZE") == "thread" else "address,undefined"
# AddressSanitizer detects null pointers and accesses outside of a block; checking them twice takes long to compile.
UNCHECKED = [] if SANITIZERS == "thread" else ["-fno-sanitize=null,pointer-overflow"]
SANITIZE = [f"-fsanitize={SANITIZERS}", *UNCHECKED] if is_set("SGMIM_FAST_SANITIZE") else []
# Leaves out instruction sets that the sanitized tests do not run on this machine: each takes a quarter of the time to
# compile.
CPU = Path("/proc/cpuinfo")
TARGET = [f"-m{kind}" for kind in ("avx512bf16", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx2", "fma")]
WIDEST = ["-DSGMIM_WIDEST_ONLY", *TARGET] if CPU.exists() and "avx512_bf16" in CPU.read_text() else []
FEWER = ["-DSGMIM_BASELINE_ONLY"] if SANITIZERS == "thread" else WIDEST
# -O0 compiles in half the time. The threads' test would run longer with it than it saves.
LEVEL = "-O1" if SANITIZERS == "thread" else "-O0"


def find_torch() -> Path | None:
    """Returns the folder of the torch to compile against, without importing it."""
    spec = importlib.util.find_spec("torch")
    return Path(spec.origin).parent if spec and spec.origin else None


def torch_cuda() -> str | None:
    """Returns the CUDA version of the torch that will run the library, or None if that torch has no CUDA: the one
    installed here, which an isolated build hides, else the one to compile against."""
    installed = Path(sysconfig.get_path("platlib"), "torch")
    folder = installed if (installed / "version.py").is_file() else find_torch()
    return runpy.run_path(str(folder / "version.py"))["cuda"] if folder else None


def find_compiler() -> tuple[list[str], str]:
    """Returns the C++ compiler's command, or [] and the reason why there is none."""
    if wanted := shlex.split(os.environ.get("CXX", "")):
        return (wanted, "") if shutil.which(wanted[0]) else ([], f"no C++ compiler: CXX={wanted[0]} is not found")
    found = next(filter(shutil.which, ("c++", "g++", "clang++")), None)
    return ([found], "") if found else ([], "no C++ compiler is found (c++, g++ or clang++); install one")


def find_nvcc() -> tuple[str, str]:
    """Returns the path of nvcc, or "" and the reason why there is none."""
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if home := os.environ.get(name):
            nvcc = Path(home, "bin", "nvcc")
            return (str(nvcc), "") if nvcc.is_file() else ("", f"{name}={home} has no bin/nvcc")
    usual = ["/usr/local/cuda/bin/nvcc", *sorted(glob("/usr/local/cuda-*/bin/nvcc"), reverse=True)]
    found = shutil.which("nvcc") or next(filter(os.path.isfile, usual), "")
    return found, "" if found else "no CUDA toolkit is found (CUDA_HOME, nvcc on PATH, /usr/local/cuda); install one"


def answer(*command: str) -> str:
    """Returns the standard output of a command, or "" if it fails."""
    done = subprocess.run(command, capture_output=True, text=True)
    return "" if done.returncode else done.stdout


def torch_version(torch: Path) -> str:
    return runpy.run_path(str(torch / "version.py"))["__version__"]


def visible_gpus() -> list[str]:
    """Returns the compute capabilities of this machine's GPUs, such as ["9.0"]."""
    query = ("--query-gpu=compute_cap", "--format=csv,noheader")
    found = answer("nvidia-smi", *query) if shutil.which("nvidia-smi") else ""
    return sorted(set(re.findall(r"^\d+\.\d+$", found, re.MULTILINE)), key=float)


def architectures(nvcc: str) -> list[str]:
    """Returns the architectures to compile for, such as ["8.0", "9.0+PTX"]."""
    if wanted := re.findall(r"[^;,\s]+", os.environ.get("TORCH_CUDA_ARCH_LIST", "")):
        return wanted
    known = answer(nvcc, "--list-gpu-code").split()
    # This machine's GPUs matter for editable installations alone: a wheel may be used elsewhere.
    here = visible_gpus() if {"editable_wheel", "develop", "--inplace", "-i"} & set(sys.argv) else []
    if here and all(float(arch) >= 8 and "sm_" + arch.replace(".", "") in known for arch in here):
        return here
    found = [arch for arch in ("8.0", "9.0", "10.0") if "sm_" + arch.replace(".", "") in known]
    return [*found[:-1], found[-1] + "+PTX"]


def gencode(arch: str) -> list[str]:
    """Returns nvcc's flags for one entry of `architectures`."""
    match = re.fullmatch(r"(\d+)\.(\d[af]?)(\+PTX)?", arch)
    if not match:
        raise CompileError(f"TORCH_CUDA_ARCH_LIST has {arch!r}; expected numbers such as 9.0 or 9.0+PTX")
    kinds = ("sm", "compute") if match[3] else ("sm",)
    return [f"-gencode=arch=compute_{match[1]}{match[2]},code={kind}_{match[1]}{match[2]}" for kind in kinds]


def plan() -> dict[str, dict[str, str]]:
    """Returns for "cpu" and for "cuda" the tools to use, or under "skipped" why the library is left out."""
    compiler, missing = find_compiler()
    if is_set("SGMIM_FAST_NO_EXT"):
        missing = "SGMIM_FAST_NO_EXT was set"
    elif not sys.platform.startswith("linux"):
        missing = f"the native libraries are built on Linux only, not on {sys.platform}"
    if missing:
        return {"cpu": {"skipped": missing}, "cuda": {"skipped": missing}}
    cpu = {"compiler": answer(*compiler, "--version").partition("\n")[0]}

    nvcc, missing = find_nvcc()
    for name in filter(is_set, ("SGMIM_FAST_NO_CUDA", "SGMIM_FAST_SANITIZE")):
        missing = f"{name} was set"
    if missing:
        return {"cpu": cpu, "cuda": {"skipped": missing}}
    toolkit, torch = re.search(r"release ((\d+)\.\d+)", answer(nvcc, "--version")), torch_cuda()
    if not toolkit:
        missing = f"{nvcc} --version does not run; repair the CUDA toolkit"
    elif not torch:
        missing = "this torch is built without CUDA; install one that has it"
    elif toolkit[2] != torch.partition(".")[0]:
        wanted = torch.partition(".")[0]
        missing = f"{nvcc} is of CUDA {toolkit[1]}, torch of {torch}; point CUDA_HOME to a CUDA {wanted} toolkit"
    if missing:
        return {"cpu": cpu, "cuda": {"skipped": missing}}
    return {"cpu": cpu, "cuda": {"nvcc": nvcc, "toolkit": toolkit[1], "architectures": ";".join(architectures(nvcc))}}


PLAN = plan()


def record(folder: Path) -> None:
    """Writes the build info into the package, and prints which library is left out."""
    (folder / "_build_info.json").write_text(json.dumps(PLAN, indent=1) + "\n")
    if reason := PLAN["cpu"].get("skipped"):
        print(f"sgmim_fast: no native library is built: {reason}", file=sys.stderr)
    elif reason := PLAN["cuda"].get("skipped"):
        print(f"sgmim_fast: the CUDA library is not built: {reason}", file=sys.stderr)


class BuildPy(build_py):
    """Also removes the libraries of an earlier build, and writes the build info."""

    def run(self) -> None:
        super().run()
        folder = Path("." if self.editable_mode else self.build_lib, "sgmim_fast")
        for old in folder.glob("_C*.so"):
            old.unlink()
        record(folder)


class BuildExt(build_ext):
    """Compiles the sources in parallel, each only if it, a header or the flags have changed, and links them."""

    def run(self) -> None:
        super().run()
        if self.inplace:
            record(Path("sgmim_fast"))

    def finalize_options(self) -> None:
        # The same folder for every command, so that `build_ext --inplace` reuses the objects of `pip install`.
        self.build_temp = self.build_temp or str(Path("build", "objects"))
        super().finalize_options()

    def build_extensions(self) -> None:
        torch, cxx, nvcc = find_torch(), find_compiler()[0], PLAN["cuda"].get("nvcc")
        if torch is None:
            raise CompileError("no torch to compile against; keep pip's build isolation, or install torch first")
        self.torch = torch
        libraries = [f"-L{torch / 'lib'}", "-ltorch", "-ltorch_cpu"]
        include = [*FLAGS, "-isystem", str(torch / "include")]
        cpu = [LEVEL, "-g1", "-fno-omit-frame-pointer", *FEWER, *SANITIZE] if SANITIZE else ["-O3"]
        cpu += ["-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", *shlex.split(os.environ.get("CXXFLAGS", ""))]
        self.compilers = {".cpp": [*cxx, *include, *cpu]}
        self.linkers = {".cpp": ([*cxx, "-shared", *SANITIZE], libraries + shlex.split(os.environ.get("LDFLAGS", "")))}
        if nvcc:
            host = [nvcc, *(["-ccbin", *cxx] if len(cxx) == 1 else []), "-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall"]
            gpu = [option for arch in architectures(nvcc) for option in gencode(arch)]
            self.compilers[".cu"] = [*host, *include, "-DUSE_CUDA", "-O3", "-Xptxas=-v", *gpu]
            # nvcc links, since it knows where its toolkit is. The CUDA runtime is linked statically and hidden, so that
            # the library runs with any torch of that CUDA major version, whichever runtime torch ships.
            hide = ["-cudart", "static", "-Xlinker", "--exclude-libs=ALL"]
            self.linkers[".cu"] = ([*host, "-shared", *hide], [*libraries, "-ltorch_cuda"])
        self.all, self.compiled, self.begun = sum(len(ext.sources) for ext in self.extensions), 0, time.monotonic()
        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
            compiling = [(ext, pool.map(self.compile, ext.sources)) for ext in self.extensions]
            for ext, objects in compiling:
                objects = list(objects)
                if ext.sources[0].endswith(".cu"):  # benchmarks/cuda_report.py reads this log
                    logs = (Path(o).with_suffix(".log").read_text() for o in objects)
                    Path(self.build_temp, "ptxas.log").write_text("".join(logs))
                before, after = self.linkers[Path(ext.sources[0]).suffix]
                library = Path(self.get_ext_fullpath(ext.name))
                library.parent.mkdir(parents=True, exist_ok=True)
                self.call([*before, *objects, "-o", str(library), *after], f"link {library.name}")

    def compile(self, source: str) -> str:
        command = [*self.compilers[Path(source).suffix], "-c", source, "-o"]
        # The key identifies flags and torch. Isolated builds change torch's folder, so its version replaces the path.
        key = shlex.join(command).replace(str(self.torch), torch_version(self.torch))
        folder = f"{zlib.crc32(key.encode()):08x}"
        target = Path(self.build_temp, folder, source).with_suffix(".o")
        if not target.exists() or target.stat().st_mtime < max(map(os.path.getmtime, [source, *HEADERS])):
            target.parent.mkdir(parents=True, exist_ok=True)
            output = self.call([*command, str(target)], f"compile {source}")
            target.with_suffix(".log").write_text(output)
            self.compiled += 1
            seconds = time.monotonic() - self.begun
            print(f"sgmim_fast: compiled {source}, {self.compiled} of {self.all} ({seconds:.0f} s)", flush=True)
        return str(target)

    def call(self, command: list[str], purpose: str) -> str:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode or "warning" in done.stdout:
            print(shlex.join(command), done.stdout, sep="\n", end="", flush=True)
        if done.returncode:
            without = "SGMIM_FAST_NO_CUDA" if command[0] == PLAN["cuda"].get("nvcc") else "SGMIM_FAST_NO_EXT"
            raise CompileError(f"{command[0]} could not {purpose}, see above; {without}=1 installs without it")
        return done.stdout


SOURCES = {"cpu": ("sgmim_fast._C", "csrc/cpu/*.cpp"), "cuda": ("sgmim_fast._C_cuda", "csrc/cuda/*.cu")}
setup(
    packages=[*find_packages(include=["sgmim_fast", "sgmim_fast.*"]), "sgmim_fast.kernels"],
    package_dir={"sgmim_fast.kernels": "kernels"},
    package_data={"sgmim_fast": ["py.typed"]},
    ext_modules=[
        Extension(name, sorted(glob(sources)), depends=HEADERS, py_limited_api=True)
        for part, (name, sources) in SOURCES.items()
        if "skipped" not in PLAN[part]
    ],
    cmdclass={"build_py": BuildPy, "build_ext": BuildExt},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
