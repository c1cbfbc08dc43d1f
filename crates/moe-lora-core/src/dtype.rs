//! Number formats of weights and activations.

use half::{bf16, f16};
use std::fmt;

/// A number format of weights, adapters or activations.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DType {
    /// IEEE 754 binary32.
    F32,
    /// IEEE 754 binary16.
    F16,
    /// bfloat16: the upper half of a binary32.
    Bf16,
}

impl DType {
    /// Bytes of one number.
    #[must_use]
    pub const fn size(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
        }
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
        })
    }
}

mod sealed {
    pub trait Sealed {}
    impl Sealed for f32 {}
    impl Sealed for half::f16 {}
    impl Sealed for half::bf16 {}
}

/// A number type that tensors can hold: `f32`, [`half::f16`] or [`half::bf16`].
pub trait Element: bytemuck::Pod + Send + Sync + fmt::Debug + PartialEq + sealed::Sealed {
    /// The format's tag.
    const DTYPE: DType;
    /// Exact widening.
    fn to_f32(self) -> f32;
    /// Rounds to nearest, ties to even.
    fn from_f32(value: f32) -> Self;
    /// This slice with its format as a tag.
    fn wrap(values: &[Self]) -> Slice<'_>;
    /// The inverse of [`wrap`](Self::wrap); `None` if the slice holds another format.
    fn unwrap(slice: Slice<'_>) -> Option<&[Self]>;
}

macro_rules! element {
    ($type:ty, $tag:ident, $to:expr, $from:expr) => {
        impl Element for $type {
            const DTYPE: DType = DType::$tag;
            #[inline(always)]
            fn to_f32(self) -> f32 {
                $to(self)
            }
            #[inline(always)]
            fn from_f32(value: f32) -> Self {
                $from(value)
            }
            fn wrap(values: &[Self]) -> Slice<'_> {
                Slice::$tag(values)
            }
            fn unwrap(slice: Slice<'_>) -> Option<&[Self]> {
                match slice {
                    Slice::$tag(values) => Some(values),
                    _ => None,
                }
            }
        }
    };
}
element!(f32, F32, |x| x, |x| x);
element!(f16, F16, f16::to_f32, f16::from_f32);
// The shift is what `bf16::to_f32` does besides quieting NaNs; it vectorises, the library's branch does not.
element!(bf16, Bf16, |x: bf16| f32::from_bits(u32::from(x.to_bits()) << 16), bf16::from_f32);

/// Numbers whose format is known at run time only.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Slice<'a> {
    /// f32 values.
    F32(&'a [f32]),
    /// f16 values.
    F16(&'a [f16]),
    /// bf16 values.
    Bf16(&'a [bf16]),
}

impl Slice<'_> {
    /// The format.
    #[must_use]
    pub const fn dtype(&self) -> DType {
        match self {
            Self::F32(_) => DType::F32,
            Self::F16(_) => DType::F16,
            Self::Bf16(_) => DType::Bf16,
        }
    }

    /// How many numbers.
    #[must_use]
    pub const fn len(&self) -> usize {
        match self {
            Self::F32(v) => v.len(),
            Self::F16(v) => v.len(),
            Self::Bf16(v) => v.len(),
        }
    }

    /// Whether there are none.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The number at `index`, widened.
    ///
    /// # Panics
    /// If `index` is outside, as slices do.
    #[must_use]
    pub fn get(&self, index: usize) -> f32 {
        match self {
            Self::F32(v) => v[index],
            Self::F16(v) => v[index].to_f32(),
            Self::Bf16(v) => Element::to_f32(v[index]),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bf16_widening_equals_the_library_on_every_finite_value() {
        for bits in 0..=u16::MAX {
            let x = bf16::from_bits(bits);
            if !x.is_nan() {
                assert_eq!(Element::to_f32(x).to_bits(), x.to_f32().to_bits());
            }
        }
    }
}
