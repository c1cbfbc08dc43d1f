//! Running a drawn case on GPU 0, adapters in a pool there.
use super::{BF16_BOUND, DELTA_BOUND, F16_BOUND, ROW_BOUND};
use half::{bf16, f16};
use moe_lora_core::{AdapterWeights, DType, Element, ModelShape, TokenAdapters};
use moe_lora_pool::{AdapterPool, PoolConfig};
use moe_lora_reference::metrics::{delta_error, delta_share, is_near_twin, relative_error, worst_row_error};
use moe_lora_reference::random::Case;
use moe_lora_reference::{GpuRounding, forward_rounded};
use moe_lora_runner::{Batch, CudaRunner, CudaWeights, Device, Limits};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};

/// GPU 0, or `None` after a loud word.
pub fn device() -> Option<&'static Device> {
    static DEVICE: OnceLock<Option<Device>> = OnceLock::new();
    DEVICE
        .get_or_init(|| moe_lora_cuda::testing::gpu("layers of the runner").map(|_| Device::cuda(0).unwrap()))
        .as_ref()
}

/// A case's layer and adapters on the GPU.
pub struct OnGpu {
    weights: CudaWeights,
    pool: AdapterPool,
    ids: Vec<Option<moe_lora_core::AdapterId>>,
    limits: Limits,
    dtype: DType,
}

impl OnGpu {
    pub fn new(device: &Device, case: &Case) -> Self {
        let model = ModelShape::uniform(case.spec.shape, 1, case.spec.weight_dtype);
        let config = PoolConfig { bytes: 256 << 20, ..PoolConfig::default() };
        let pool = AdapterPool::new(device, &model, config).unwrap();
        let load = |(n, adapter): (usize, &moe_lora_core::AdapterLayer)| {
            // One that changes nothing is no adapter.
            let weights = AdapterWeights::new(&model, [(0, adapter.clone())].into()).ok()?;
            (adapter.max_rank() > 0).then(|| pool.load(&n.to_string(), weights).unwrap())
        };
        let ids = case.adapters.iter().enumerate().map(load).collect();
        let max_rank = case.table().max_rank().max(1);
        let limits = Limits { max_tokens: case.spec.tokens.max(1), max_rank };
        let weights = CudaWeights::upload(device.gpu().unwrap(), &case.weights).unwrap();
        Self { weights, pool, ids, limits, dtype: case.spec.weight_dtype }
    }

    /// The output for the case's batch, which may be another than that of `new`, in pieces of at most `max_tokens`.
    pub fn forward(&self, device: &Device, case: &Case, lora: bool, max_tokens: usize) -> Vec<f64> {
        match self.dtype {
            DType::F16 => self.typed::<f16>(device, case, lora, max_tokens),
            _ => self.typed::<bf16>(device, case, lora, max_tokens),
        }
    }

    fn typed<X: Element>(&self, device: &Device, case: &Case, lora: bool, max_tokens: usize) -> Vec<f64> {
        let id = |slot: &i32| self.ids.get(*slot as usize).copied().flatten().filter(|_| lora);
        let tokens: Vec<_> = case.token_slots.iter().map(id).collect();
        let lease = self.pool.lease(&TokenAdapters::from_ids(&tokens)).unwrap();
        let table = lease.device_table(0).unwrap();
        let token_slots: Vec<i32> = tokens.iter().map(|id| id.map_or(-1, |id| id.slot as i32)).collect();
        let hidden = case.hidden_as::<X>();
        let mut out = vec![X::from_f32(f32::NAN); hidden.len()];
        let batch = Batch {
            hidden: &hidden,
            topk_ids: &case.topk_ids,
            topk_weights: &case.topk_weights,
            token_slots: &token_slots,
            adapters: &table,
        };
        let limits = Limits { max_tokens, ..self.limits };
        let mut runner = CudaRunner::new(device.gpu().unwrap(), &case.spec.shape, limits).unwrap();
        runner.forward(&self.weights, &batch, &mut out).unwrap();
        out.iter().map(|v| v.to_f32().into()).collect()
    }
}

/// How many cases to run where sanitizers make them slow: `MOE_LORA_CASES`.
pub fn limit() -> Option<usize> {
    std::env::var("MOE_LORA_CASES").ok().and_then(|n| n.parse().ok())
}

/// What is wrong with a case's result on the GPU, if there is one, it takes layers of these sizes, and the limit is not reached.
pub fn broken(case: &Case) -> Option<String> {
    static CASES: AtomicUsize = AtomicUsize::new(0);
    let device = device()?;
    if limit().is_some_and(|most| CASES.fetch_add(1, Ordering::Relaxed) >= most) {
        return None;
    }
    let (shape, dtype) = (case.spec.shape, case.spec.weight_dtype);
    // f32 layers are rounded to bf16 there: other inputs than the truth's.
    if !shape.hidden_size.is_multiple_of(8) || !shape.intermediate_size.is_multiple_of(8) || dtype == DType::F32 {
        return None;
    }
    let on_gpu = OnGpu::new(device, case);
    let found = on_gpu.forward(device, case, true, case.spec.tokens.max(1));
    if found != on_gpu.forward(device, case, true, case.spec.tokens.max(1)) {
        return Some("not the same bits twice".to_owned());
    }
    let base = on_gpu.forward(device, case, false, case.spec.tokens.max(1));
    let width = shape.hidden_size;
    for t in (0..case.spec.tokens).filter(|&t| case.token_slots[t] < 0) {
        if found[t * width..][..width] != base[t * width..][..width] {
            return Some(format!("base token {t} differs in a mixed batch"));
        }
    }

    let mantissa_bits = if dtype == DType::F16 { 10 } else { 7 };
    let input = case.table();
    let near = |expert_outputs_f32| {
        let twin = forward_rounded(&case.input_with(&input), &GpuRounding { dtype, expert_outputs_f32 }).unwrap();
        is_near_twin(&found, &twin, width, mantissa_bits)
    };
    let (truth, truth_base) = (case.truth().unwrap(), case.base_truth().unwrap());
    let error = relative_error(&found, &truth);
    if !near(true) && !near(false) {
        return Some(format!("far from the twin, relative error {error:.2e}"));
    }
    // What follows is stated for means over many values, of layers of which adapters make up a quarter.
    let share = delta_share(&truth, &truth_base);
    if found.len() < 4096 || share < 0.25 {
        return None;
    }
    // Large batches and Hopper's products for many rows keep expert outputs in 16 bits.
    let rows = case.topk_ids.len();
    let many = rows >= 12 * shape.num_experts && rows * width * shape.intermediate_size >= 1 << 30;
    let f32_rows = rows * width * 4 <= 16 << 20 && !many;
    let bound = if dtype == DType::F16 {
        F16_BOUND
    } else if f32_rows {
        BF16_BOUND
    } else {
        3.3e-3
    };
    let (worst, delta) = (worst_row_error(&found, &truth, width), delta_error(&found, &base, &truth, &truth_base));
    (error > bound || worst > ROW_BOUND || delta > DELTA_BOUND)
        .then(|| format!("relative error {error:.2e}, bound {bound:.1e}, worst row {worst:.2e}, change {delta:.2e}"))
}
