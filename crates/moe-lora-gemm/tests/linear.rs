//! Dense projections against f64, and that a row's bits are its own.
#![allow(clippy::unwrap_used, clippy::panic, reason = "tests may fail loudly")]

use half::{bf16, f16};
use moe_lora_core::{DType, Element, Lora, Matrix};
use moe_lora_gemm::cpu::{Kernel, Linear, LinearScratch, linear, products};
use moe_lora_reference::metrics::relative_error;

const N: usize = 75;
const K: usize = 83;

fn draw<T: Element>(rng: &mut fastrand::Rng, n: usize, scale: f32) -> Vec<T> {
    (0..n).map(|_| T::from_f32(scale * (2.0 * rng.f32() - 1.0))).collect()
}

fn matrix<T: Element>(rng: &mut fastrand::Rng, rows: usize, cols: usize) -> Matrix {
    Matrix::from_vec(draw::<T>(rng, rows * cols, 1.0), rows, cols).unwrap()
}

struct Case<X> {
    weight: Matrix,
    bias: Vec<f32>,
    adapters: Vec<Lora>,
    x: Vec<X>,
    /// Adapter of every row.
    rows: Vec<Option<usize>>,
}

impl<X: Element> Case<X> {
    fn new<W: Element>(tokens: usize) -> Self {
        let rng = &mut fastrand::Rng::with_seed(tokens as u64);
        let adapters = [4, 17, 40].map(|r| {
            let scale = 1.0 + r as f32 / 64.0;
            Lora::new(matrix::<W>(rng, r, K), matrix::<W>(rng, N, r), scale).unwrap()
        });
        Self {
            weight: matrix::<W>(rng, N, K),
            bias: draw(rng, N, 1.0),
            adapters: adapters.into(),
            x: draw(rng, tokens * K, 1.0),
            rows: (0..tokens).map(|_| rng.usize(0..4).checked_sub(1)).collect(),
        }
    }

    /// The rows that `keep` chooses, on a scratch that was used before.
    fn run(&self, kernel: Kernel, keep: impl Fn(usize) -> bool) -> Vec<f32> {
        let kept: Vec<usize> = (0..self.rows.len()).filter(|&t| keep(t)).collect();
        let x: Vec<X> = kept.iter().flat_map(|&t| self.x[t * K..][..K].to_vec()).collect();
        let loras: Vec<_> = kept.iter().map(|&t| self.rows[t].map(|a| &self.adapters[a])).collect();
        let mut scratch = LinearScratch::default();
        let mut out = vec![f32::NAN; kept.len() * N];
        let args = Linear { weight: &self.weight, bias: Some(&self.bias), loras: &loras };
        for _ in 0..2 {
            out.fill(f32::NAN);
            linear(&args, &x, kernel, &mut scratch, &mut out).unwrap();
        }
        out
    }

    fn truth(&self) -> Vec<f64> {
        let at = |m: &Matrix, r, c| f64::from(m.get(r, c));
        let mut out = Vec::new();
        for (t, adapter) in self.rows.iter().enumerate() {
            let x: Vec<f64> = self.x[t * K..][..K].iter().map(|x| x.to_f32().into()).collect();
            for n in 0..N {
                let mut y = f64::from(self.bias[n]) + (0..K).map(|k| at(&self.weight, n, k) * x[k]).sum::<f64>();
                if let Some(lora) = adapter.map(|a| &self.adapters[a]) {
                    let s = |r| (0..K).map(|k| at(lora.a(), r, k) * x[k]).sum::<f64>();
                    y += f64::from(lora.scale()) * (0..lora.rank()).map(|r| at(lora.b(), n, r) * s(r)).sum::<f64>();
                }
                out.push(y);
            }
        }
        out
    }
}

fn check<W: Element, X: Element>() {
    let case = Case::<X>::new::<W>(150);
    let truth = case.truth();
    for kernel in Kernel::available().filter(|k| k.supports(W::DTYPE, X::DTYPE)) {
        let all = case.run(kernel, |_| true);
        let wide: Vec<f64> = all.iter().map(|&v| v.into()).collect();
        let error = relative_error(&wide, &truth);
        assert!(error < 1e-5, "{kernel}: {error:e}");
        for step in [150, 9, 2] {
            let few = case.run(kernel, |t| t % step == 1);
            let same: Vec<f32> = (0..150).filter(|t| t % step == 1).flat_map(|t| all[t * N..][..N].to_vec()).collect();
            assert!(few.iter().zip(&same).all(|(a, b)| a.to_bits() == b.to_bits()), "{kernel}, every {step}th row");
        }
    }
}

#[test]
fn rows_have_their_own_adapters_and_bits() {
    check::<f32, f32>();
    check::<f16, f32>();
    check::<bf16, f32>();
    check::<bf16, bf16>();
}

#[test]
fn zeros_behind_a_vector_leave_its_bits() {
    let rng = &mut fastrand::Rng::with_seed(3);
    let (rows, stride) = (70, 100);
    let w: Vec<bf16> = draw(rng, rows * stride, 1.0);
    let mut x: Vec<f32> = draw(rng, 66 * stride, 1.0);
    x.chunks_mut(stride).for_each(|x| x[37..].fill(0.0));
    for kernel in Kernel::available() {
        let run = |cols| {
            let mut out = vec![f32::NAN; 66 * 80];
            products(kernel, bf16::wrap(&w), [rows, cols, stride], (&x, stride), (&mut out, 80)).unwrap();
            out
        };
        let (short, long) = (run(37), run(90));
        for n in 0..66 {
            for r in 0..rows {
                let want: f64 =
                    (0..37).map(|c| f64::from(w[r * stride + c].to_f32()) * f64::from(x[n * stride + c])).sum();
                assert!((f64::from(short[n * 80 + r]) - want).abs() < 1e-5);
                assert_eq!(short[n * 80 + r].to_bits(), long[n * 80 + r].to_bits(), "{kernel}");
            }
            assert!(short[n * 80 + rows..][..80 - rows].iter().all(|v| v.is_nan()), "written past the row");
        }
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let case = Case::<f32>::new::<f32>(2);
    let kernel = Kernel::best(DType::F32, DType::F32);
    let scratch = &mut LinearScratch::default();
    let base = Linear { weight: &case.weight, bias: None, loras: &[] };
    let mut out = vec![0.0; 2 * N];
    assert!(linear(&base, &case.x, kernel, scratch, &mut out).is_ok());
    assert!(linear(&base, &case.x[1..], kernel, scratch, &mut out).is_err());
    assert!(linear(&base, &case.x, kernel, scratch, &mut out[1..]).is_err());
    let bias = [0.0; 3];
    assert!(linear(&Linear { bias: Some(&bias), ..base }, &case.x, kernel, scratch, &mut out).is_err());
    let loras = [Some(&case.adapters[0])];
    assert!(linear(&Linear { loras: &loras, ..base }, &case.x, kernel, scratch, &mut out).is_err());
    let rng = &mut fastrand::Rng::with_seed(0);
    let narrow = Lora::new(matrix::<f32>(rng, 2, K), matrix::<f32>(rng, N - 1, 2), 1.0).unwrap();
    let loras = [None, Some(&narrow)];
    let error = linear(&Linear { loras: &loras, ..base }, &case.x, kernel, scratch, &mut out).unwrap_err();
    assert!(error.to_string().starts_with("adapter of row 1"), "{error}");
    let half = Lora::new(matrix::<bf16>(rng, 2, K), matrix::<bf16>(rng, N, 2), 1.0).unwrap();
    let loras = [None, Some(&half)];
    assert!(linear(&Linear { loras: &loras, ..base }, &case.x, kernel, scratch, &mut out).is_err());

    let w = [0.0_f32; 12];
    let x = [0.0_f32; 6];
    let mut run = |shape, x_stride, out_stride| {
        products(kernel, f32::wrap(&w), shape, (&x, x_stride), (&mut out[..8], out_stride)).is_ok()
    };
    assert!(run([4, 3, 3], 3, 4));
    assert!(!run([4, 3, 2], 3, 4) && !run([5, 3, 3], 3, 4) && !run([4, 3, 4], 3, 4), "w");
    assert!(!run([4, 3, 3], 2, 4) && !run([4, 3, 3], 4, 4) && !run([4, 3, 3], 0, 4), "x");
    assert!(!run([4, 3, 3], 3, 3) && !run([4, 3, 3], 3, 5), "out");
}
