#!/usr/bin/env python3
"""Downloads systems' published packages and unpacks what peer_*.py needs of them, for PEERS=FOLDER: prepare.py FOLDER SYSTEM...

What is there already stays. vLLM's library loses its images for other GPUs than those of compute capability 9.0, which makes
FOLDER 40 MB smaller to carry to a GPU machine. What SGLang compiles when it runs is kept in FOLDER/jit.
"""

import pathlib
import struct
import subprocess
import sys
import tempfile
import zipfile

# Requirements, and the files that are kept.
PACKAGES = {
    "vllm": (
        ["vllm==0.33.0"],
        ("vllm/lora/", "vllm/model_executor/layers/fused_moe/", "vllm/_moe_C_stable_libtorch.abi3.so"),
    ),
    "sglang_0510": (["sglang==0.5.10"], ("sglang/jit_kernel/", "sglang/srt/layers/moe/", "sglang/srt/lora/")),
    "sglang_0523": (
        ["sglang==0.5.23"],
        ("sglang/kernels/", "sglang/srt/layers/moe/", "sglang/srt/lora/", "sglang/srt/environ.py"),
    ),
    "site": (
        [
            *("apache-tvm-ffi==0.1.15.post2", "msgspec==0.22.0", "pydantic==2.14.3", "pydantic-core==2.50.4"),
            *("annotated-types==0.8.0", "typing-inspection==0.4.5", "typing-extensions==4.16.0"),
        ],
        ("tvm_ffi", "apache_tvm_ffi", "msgspec", "pydantic", "annotated_types", "typing_"),
    ),
    "cutedsl": (
        [f"nvidia-cutlass-dsl{part}==4.8.1" for part in ("", "-libs-base", "-libs-core", "-libs-cu13")],
        ("nvidia_cutlass_dsl",),
    ),
}
# What each system needs: the last release's CUDA kernels stand in for the first one's closed library.
SYSTEMS = {
    "vllm": ("vllm",),
    "sglang_0510": ("sglang_0510", "sglang_0523", "site"),
    "sglang_0523_triton": ("sglang_0523", "site"),
    "sglang_0523_cutedsl": ("sglang_0523", "site", "cutedsl"),
}
ARCH = 90
FATBIN, CUBIN = 0xBA55ED50, 2


def slim(path):
    """Blanks images for other GPUs within a library's fatbins; what stays is where it was."""
    data = bytearray(path.read_bytes())
    magic, at, blanked = struct.pack("<I", FATBIN), -1, 0
    while (at := data.find(magic, at + 1)) >= 0:
        _, version, header, size = struct.unpack_from("<IHHQ", data, at)
        image, end = at + header, at + header + size
        if version != 1 or header != 16 or end > len(data):
            continue
        while image < end:
            kind, _, header, size = struct.unpack_from("<HHIQ", data, image)
            (arch,) = struct.unpack_from("<I", data, image + 28)
            if (kind, arch) != (CUBIN, ARCH):
                data[image + header : image + header + size] = bytes(size)
                blanked += size
            image += header + size
    path.write_bytes(data)
    return blanked


def unpack(package, target):
    """Downloads with pip, and unpacks."""
    requirements, kept = PACKAGES[package]
    with tempfile.TemporaryDirectory() as download:
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--dest", download]
        subprocess.run([*pip, *requirements], check=True)
        for wheel in pathlib.Path(download).glob("*.whl"):
            with zipfile.ZipFile(wheel) as files:
                files.extractall(target, [n for n in files.namelist() if n.startswith(kept)])
    blanked = sum(slim(library) for library in target.rglob("_moe_C*.so"))
    files = [f for f in target.rglob("*") if f.is_file()]
    size = sum(f.stat().st_size for f in files) - blanked
    print(f"{', '.join(requirements)}: {len(files)} files, {size / 1e6:.0f} MB in {target}")


def main():
    """Unpacks what is not there."""
    folder, *systems = sys.argv[1:] or [""]
    if not systems or not set(systems) <= SYSTEMS.keys():
        sys.exit(f"{__doc__}\nsystems: {', '.join(SYSTEMS)}")
    for package in dict.fromkeys(package for system in systems for package in SYSTEMS[system]):
        target = pathlib.Path(folder) / package
        if not target.exists():
            unpack(package, target)


if __name__ == "__main__":
    main()
