//! The CPU backend.
//!
//! # Stages
//!
//! [`gate_up`], [`down`] and [`combine`] run one after the other on one [`Workspace`], in the current rayon pool. They
//! allocate nothing. Each checks all of its arguments before it writes.
//!
//! | stage | computes | parallel over |
//! |---|---|---|
//! | [`gate_up`] | `S = A x` of adapter rows, then `h = act(W13 x + b13 + B (s S))` | row parts; (expert rows, 32 features) |
//! | [`down`] | `S = A h`, then `y = W2 h + b2 + B (s S)` | the same |
//! | [`combine`] | `out = routed_scaling * sum_j w_j y_j`, `j` ascending, dropped pairs skipped | tokens |
//!
//! An A that all experts share is applied once a token and not once a row, and an A that serves gate and up once for
//! both. A down B that all experts share is applied in [`combine`], once a token, to `sum_j w_j s A_j h_j`. Rows without
//! an adapter, and projections that an adapter does not change, cost nothing.
//!
//! Around the experts, an engine needs two more functions: [`linear`] is a dense projection whose rows each have their
//! own adapter (attention, the head of the model), and [`products`] multiplies a few vectors with a strided view (scores
//! and sums over a key-value cache). Both give a row the same bits whatever is beside it.
//!
//! # Rounding
//!
//! All sums are f32. Numbers are rounded to less than that in these places only:
//!
//! | | [`Kernel::Avx512Bf16`] | the others |
//! |---|---|---|
//! | `hidden` | read as it is (bf16) | widened, exact |
//! | weights, A, B | read as they are (bf16); B widened, exact | widened in registers, exact |
//! | products and sums | `vdpbf16ps`: f32, subnormals are zero | f32 |
//! | `h` | **rounded to bf16**, subnormals kept | f32 |
//! | `S`, biases, `y`, routing weights | f32 | f32 |
//! | `out` | **rounded to its format** | **rounded to its format** |
//!
//! # Same bits
//!
//! An output element is computed by one sequence of operations that depends on its own row and on K alone: never on
//! which rows are beside it, where it is in a tile, or how many threads run. Base rows of a mixed batch have the bits of
//! a base-only run, and a token's output does not depend on the rest of the batch. Kernels differ among each other.
//!
//! # Speed
//!
//! A tile is 4 weight rows by up to 6 activation rows, both along K, so that 24 vectors of sums stay in registers. Weights
//! are read where they lie, once for every 64 rows; while the first tile of a group reads, the next group is prefetched
//! (up to 2.4 times the speed where memory is the limit). Activation rows lie an odd number of cache lines apart.
//!
//! `cargo bench -p moe-lora-gemm` on two Zen 4 threads that read 38 GB/s (E 64, k 8, H 2048, I 1024, bf16; LoRA: four
//! adapters of rank 16 and base tokens):
//!
//! | tokens | base | LoRA | |
//! |---|---|---|---|
//! | 1 | 2.4 to 3.0 ms | the same | 34 to 42 GB/s |
//! | 16 | 19.4 ms | 21.0 ms | 37 GB/s |
//! | 256 | 82 ms | 92 ms | 315 GFLOP/s of 470 |
//!
//! For f32 this is also the large-tile kernel. Against two general matrix crates, on the gate projection of one expert
//! (H 2048, I 1024, weights not in cache, one Zen 4 thread whose FMA peak is 118 GFLOP/s), in GFLOP/s:
//!
//! | rows | here | `gemm` 0.19 | `matrixmultiply` 0.3 |
//! |---|---|---|---|
//! | 6 | 63 | 14 | 10 |
//! | 32 | 89 | 48 | 42 |
//! | 64 | 97 | 66 | 58 |
//! | 256 | 97 | 66 | 86 |
//!
//! They repack the weights on every call, and neither promises the equality of bits above; so neither is used.

mod activate;
mod batch;
mod check;
mod combine;
mod down;
mod gate_up;
mod kernel;
mod linear;
mod project;
mod shrink;
mod simd;
mod workspace;

pub use kernel::Kernel;
pub use linear::{Linear, LinearScratch, linear, products};
pub use workspace::Workspace;

use crate::GemmError;
use activate::Glu;
use batch::Batch;
use kernel::{with_engine, with_f32_engine};
use moe_lora_core::{AdapterTable, Element, LayerWeights, RowMap};
use workspace::{Done, Stage};

/// What the stages read.
#[derive(Debug)]
pub struct LayerArgs<'a, X> {
    /// Hidden vectors, `[T, H]`.
    pub hidden: &'a [X],
    /// Base weights.
    pub weights: &'a LayerWeights,
    /// The sorted work.
    pub rows: &'a RowMap,
    /// The adapters of this layer by slot, in the format of the weights.
    pub adapters: &'a AdapterTable<'a>,
}

impl<X> Clone for LayerArgs<'_, X> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<X> Copy for LayerArgs<'_, X> {}

impl<'a, X: Element> LayerArgs<'a, X> {
    /// The batch, checked, with what `ws` keeps of it for all stages.
    fn batch(&self, ws: &mut Workspace) -> Result<Batch<'a>, GemmError> {
        let batch = Batch { weights: self.weights, rows: self.rows, adapters: self.adapters };
        check::batch(&batch, ws)?;
        check::tokens("hidden", self.hidden.len(), &batch)?;
        batch.bands(&mut ws.bands);
        batch.token_slots(&mut ws.buffers.token_slot)?;
        Ok(batch)
    }
}

/// First stage: gate and up projections with LoRA in the accumulators, bias and activation. Leaves `h` in `ws`.
///
/// # Errors
/// If an argument does not fit the layer or the workspace, or `kernel` cannot run here or with these formats. If adapters are
/// [parts](moe_lora_core::AdapterPart), which have something to exchange.
pub fn gate_up<X: Element>(args: &LayerArgs<'_, X>, kernel: Kernel, ws: &mut Workspace) -> Result<(), GemmError> {
    check::whole(args.weights.shape())?;
    gate_up_exchanging(args, kernel, ws, |_| Ok(()))
}

/// [`gate_up`] of a rank's part of a layer. If its adapters are parts too, `exchange` is called once and replaces what it is
/// given, `S` of this rank's ranks of A and zeros, by the sums over all parts. It is given nothing if no row has an adapter.
///
/// # Errors
/// As [`gate_up`], and those of `exchange`.
pub fn gate_up_exchanging<X: Element, E: From<GemmError>>(
    args: &LayerArgs<'_, X>,
    kernel: Kernel,
    ws: &mut Workspace,
    exchange: impl FnOnce(&mut [f32]) -> Result<(), E>,
) -> Result<(), E> {
    let batch = args.batch(ws)?;
    kernel.check(batch.weights.dtype(), X::DTYPE)?;
    ws.done = None;
    let hidden = X::wrap(args.hidden);
    with_engine!(kernel, batch.weights.dtype(), engine => gate_up::run(engine, &batch, hidden, ws, exchange))
        .ok_or(kernel.missing())??;
    ws.done = Some(Done { stage: Stage::GateUp, kernel, tokens: batch.rows.num_tokens, rows: batch.rows.num_rows() });
    Ok(())
}

/// Second stage: down projection of what [`gate_up`] left in `ws`, with LoRA and bias. Leaves `y` in `ws`.
///
/// # Errors
/// If an argument does not fit the layer or the workspace, or [`gate_up`] did not run on this batch with `kernel`. If adapters are
/// [parts](moe_lora_core::AdapterPart), which have something to exchange.
pub fn down<X: Element>(args: &LayerArgs<'_, X>, kernel: Kernel, ws: &mut Workspace) -> Result<(), GemmError> {
    check::whole(args.weights.shape())?;
    down_exchanging(args, kernel, ws, |_| Ok(()))
}

/// [`down`] of a rank's part of a layer. If its adapters are parts too, `exchange` is called once and replaces what it is given,
/// `S` of this rank's part of I, by the sums over all parts. It is given nothing if no row has an adapter.
///
/// # Errors
/// As [`down`], and those of `exchange`.
pub fn down_exchanging<X: Element, E: From<GemmError>>(
    args: &LayerArgs<'_, X>,
    kernel: Kernel,
    ws: &mut Workspace,
    exchange: impl FnOnce(&mut [f32]) -> Result<(), E>,
) -> Result<(), E> {
    let batch = args.batch(ws)?;
    kernel.check(batch.weights.dtype(), X::DTYPE)?;
    let done = check::order(ws, &batch, "down", Stage::GateUp)?;
    if done.kernel != kernel {
        return Err(GemmError::Kernel { kernel, reason: "gate_up ran with another kernel" }.into());
    }
    with_engine!(kernel, batch.weights.dtype(), engine => down::run(engine, &batch, ws, exchange))
        .ok_or(kernel.missing())??;
    ws.done = Some(Done { stage: Stage::Down, ..done });
    Ok(())
}

/// Third stage: the weighted sum over a token's experts of what [`down`] left in `ws`. Writes all of `out`, `[T, H]`;
/// tokens without a row become zero.
///
/// # Errors
/// If an argument does not fit the layer or the workspace, or [`down`] did not run on this batch.
pub fn combine<X: Element, Y: Element>(
    args: &LayerArgs<'_, X>,
    ws: &mut Workspace,
    out: &mut [Y],
) -> Result<(), GemmError> {
    let batch = args.batch(ws)?;
    check::tokens("out", out.len(), &batch)?;
    let kernel = check::order(ws, &batch, "combine", Stage::Down)?.kernel.in_f32();
    with_f32_engine!(kernel, batch.weights.dtype(), engine => combine::run(engine, &batch, ws, out))
        .ok_or(kernel.missing())
}
