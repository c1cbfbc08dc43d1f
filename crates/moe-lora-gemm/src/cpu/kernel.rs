//! The choice of the inner kernel.

use crate::GemmError;
use moe_lora_core::DType;
use std::fmt;

/// Which instructions compute the dot products.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Kernel {
    /// bf16 dot products of AVX-512, for bf16 weights with bf16 activations.
    Avx512Bf16,
    /// f32 FMA of AVX-512.
    Avx512,
    /// f32 FMA of AVX2.
    Avx2,
    /// Plain Rust, for every CPU.
    Portable,
}

impl Kernel {
    const ALL: [Self; 4] = [Self::Avx512Bf16, Self::Avx512, Self::Avx2, Self::Portable];

    /// The kernels that this CPU can run, fastest first.
    pub fn available() -> impl Iterator<Item = Self> {
        Self::ALL.into_iter().filter(|k| k.is_available())
    }

    /// The fastest kernel of this CPU for weights and activations of these formats.
    #[must_use]
    pub fn best(weights: DType, activations: DType) -> Self {
        Self::available().find(|k| k.supports(weights, activations)).unwrap_or(Self::Portable)
    }

    /// Whether the kernel computes with weights and activations of these formats.
    #[must_use]
    pub const fn supports(self, weights: DType, activations: DType) -> bool {
        match self {
            Self::Avx512Bf16 => matches!((weights, activations), (DType::Bf16, DType::Bf16)),
            _ => true,
        }
    }

    /// Whether this CPU has the instructions.
    #[must_use]
    pub fn is_available(self) -> bool {
        with_engine!(self, DType::Bf16, _engine => ()).is_some()
    }

    /// The kernel for what stays in f32 beside this one.
    pub(super) const fn in_f32(self) -> Self {
        match self {
            Self::Avx512Bf16 => Self::Avx512,
            other => other,
        }
    }

    pub(super) fn check(self, weights: DType, activations: DType) -> Result<(), GemmError> {
        if !self.supports(weights, activations) {
            return Err(GemmError::Kernel { kernel: self, reason: "it needs bf16 weights and bf16 activations" });
        }
        if !self.is_available() {
            return Err(self.missing());
        }
        Ok(())
    }

    pub(super) const fn missing(self) -> GemmError {
        GemmError::Kernel { kernel: self, reason: "this CPU lacks its instructions" }
    }
}

impl fmt::Display for Kernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Avx512Bf16 => "avx512-bf16",
            Self::Avx512 => "avx512",
            Self::Avx2 => "avx2",
            Self::Portable => "portable",
        })
    }
}

/// Evaluates `$body` with `$engine` bound to the engine of a kernel and weight format: `Some` of its value, or `None` if
/// the CPU cannot run it. The formats must be [supported](Kernel::supports).
macro_rules! with_engine {
    ($kernel:expr, $weights:expr, $engine:ident => $body:expr) => {
        match $kernel {
            #[cfg(target_arch = "x86_64")]
            $crate::cpu::Kernel::Avx512Bf16 => $crate::cpu::simd::Avx512Bf16::new().map(|$engine| $body),
            kernel => $crate::cpu::kernel::with_f32_engine!(kernel, $weights, $engine => $body),
        }
    };
}

/// The same for the kernels that read f32 activations; `None` for the others.
macro_rules! with_f32_engine {
    ($kernel:expr, $weights:expr, $engine:ident => $body:expr) => {{
        use half::{bf16, f16};
        use moe_lora_core::DType::{Bf16, F16, F32};
        use $crate::cpu::{Kernel, simd};
        match ($kernel, $weights) {
            #[cfg(target_arch = "x86_64")]
            (Kernel::Avx512, F32) => simd::Avx512::<f32>::new().map(|$engine| $body),
            #[cfg(target_arch = "x86_64")]
            (Kernel::Avx512, F16) => simd::Avx512::<f16>::new().map(|$engine| $body),
            #[cfg(target_arch = "x86_64")]
            (Kernel::Avx512, Bf16) => simd::Avx512::<bf16>::new().map(|$engine| $body),
            #[cfg(target_arch = "x86_64")]
            (Kernel::Avx2, F32) => simd::Avx2::<f32>::new().map(|$engine| $body),
            #[cfg(target_arch = "x86_64")]
            (Kernel::Avx2, F16) => simd::Avx2::<f16>::new().map(|$engine| $body),
            #[cfg(target_arch = "x86_64")]
            (Kernel::Avx2, Bf16) => simd::Avx2::<bf16>::new().map(|$engine| $body),
            (Kernel::Portable, F32) => simd::Portable::<f32>::new().map(|$engine| $body),
            (Kernel::Portable, F16) => simd::Portable::<f16>::new().map(|$engine| $body),
            (Kernel::Portable, Bf16) => simd::Portable::<bf16>::new().map(|$engine| $body),
            _ => None,
        }
    }};
}
pub(super) use {with_engine, with_f32_engine};
