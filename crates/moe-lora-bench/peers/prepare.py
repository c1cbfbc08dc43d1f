#!/usr/bin/env python3
"""Downloads a system's published package and unpacks what peer_*.py needs of it: prepare.py vllm FOLDER"""
import pathlib
import subprocess
import sys
import tempfile
import zipfile

# Requirement, and the files that are kept.
PACKAGES = {
    "vllm": (
        "vllm==0.33.0",
        ("vllm/lora/", "vllm/model_executor/layers/fused_moe/", "vllm/_moe_C_stable_libtorch.abi3.so"),
    ),
}


def main():
    """Downloads with pip, and unpacks."""
    if len(sys.argv) != 3 or sys.argv[1] not in PACKAGES:
        sys.exit(f"{__doc__}; systems: {', '.join(PACKAGES)}")
    requirement, kept = PACKAGES[sys.argv[1]]
    folder = pathlib.Path(sys.argv[2])
    with tempfile.TemporaryDirectory() as download:
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--dest", download]
        subprocess.run([*pip, requirement], check=True)
        for wheel in pathlib.Path(download).glob("*.whl"):
            with zipfile.ZipFile(wheel) as package:
                package.extractall(folder, [n for n in package.namelist() if n.startswith(kept)])
    print(f"{requirement}: {sum(1 for f in folder.rglob('*') if f.is_file())} files in {folder}")


if __name__ == "__main__":
    main()
