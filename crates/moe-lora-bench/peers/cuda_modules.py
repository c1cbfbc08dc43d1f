"""CUDA kernels that SGLang compiles when it runs: its own sources, wrappers and flags, compiled once into PEERS/jit with nvcc."""

import os
import pathlib
import shutil

from stand_ins import FOLDER

FLAGS = ["-DSGL_CUDA_ARCH=900", "-std=c++20", "-O3", "--expt-relaxed-constexpr"]


def loader(sources, arch):
    """What stands in for a release's load_jit. `sources` is the folder with its csrc and include."""
    sources = pathlib.Path(sources)

    def load_jit(*names, cuda_files, cuda_wrappers, extra_cuda_cflags=(), **_):
        import tvm_ffi

        name = "_".join([sources.relative_to(FOLDER).parts[0], *map(str, names)])
        library = FOLDER / "jit" / f"{name}.so"
        if not library.exists():
            compiled(library, name, sources, arch, cuda_files, cuda_wrappers, extra_cuda_cflags)
        return tvm_ffi.load_module(str(library))

    return load_jit


def compiled(library, name, sources, arch, files, wrappers, flags):
    """Compiles one module."""
    from tvm_ffi import cpp

    os.environ["TVM_FFI_CUDA_ARCH_LIST"] = arch
    code = [f'#include "{sources / "csrc" / file}"' for file in files] + ["namespace sglang {}", "using namespace sglang;"]
    code += [f"TVM_FFI_DLL_EXPORT_TYPED_FUNC({export}, ({function}));" for export, function in wrappers]
    built = cpp.build_inline(
        name,
        cuda_sources=code,
        extra_cflags=["-std=c++20", "-O3"],
        extra_cuda_cflags=[*FLAGS, *flags],
        extra_include_paths=[str(sources / "include")],
    )
    library.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(built, library)


GATED = ("run_activation", "run_activation_filtered", "run_activation_sorted_filtered")


class Common:
    """Align and activation of SGLang 0.5.23, for either release: the closed library that has them otherwise is not there."""

    def __init__(self):
        self.load = loader(FOLDER / "sglang_0523/sglang/kernels/jit", "9.0a")
        self.modules = {}

    def module(self, *names, **how):
        """A module, loaded once."""
        if names not in self.modules:
            self.modules[names] = self.load(*names, **how)
        return self.modules[names]

    def moe_align_block_size(self, ids, experts, block, sorted_ids, expert_ids, padded, cumsum, pad=True, *_):
        """Pairs by expert, every expert padded to whole blocks."""
        module = self.module(
            *("moe_align_block_size", "int32_t", "false", "false", "false"),
            cuda_files=["moe/moe_align_kernel.cu"],
            cuda_wrappers=[("moe_align_block_size", "MoeAlignBlockSizeKernel<int32_t, false, false, false>::run")],
        )
        module.moe_align_block_size(ids, experts, block, sorted_ids, expert_ids, padded, cumsum, pad)

    def silu_and_mul(self, x, out):
        """silu of the first half of every row times the second."""
        module = self.module(
            *("activation", "bf16_t", "true"),
            cuda_files=["elementwise/activation.cuh"],
            cuda_wrappers=[(name, f"ActivationKernel<bf16_t, true>::{name}") for name in GATED],
            extra_cuda_cflags=["--use_fast_math"],
        )
        module.run_activation(x.view(-1, x.shape[-1]), out.view(-1, out.shape[-1]), "silu")
        return out
