//! Replacing from GPU memory is replacing from the host, byte by byte, in the order of the streams.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on may panic")]

use super::super::tests::{adapter, assert_holds, lease, model, occupy, pool};
use super::*;
use crate::{AdapterPool, HostMemory, PoolError};
use half::bf16;
use moe_lora_core::{AdapterWeights, Matrix};
use moe_lora_cuda::{DeviceBuffer, testing};

/// An adapter's matrices in GPU memory, first in `staging`, rows up to 5 numbers further apart than they are long.
struct OnDevice {
    staging: DeviceBuffer,
    matrices: DeviceBuffer,
    weights: DeviceWeights,
}

impl OnDevice {
    fn new(gpu: &Gpu, weights: &AdapterWeights, stream: &Stream) -> Self {
        let (mut numbers, mut seen) = (Vec::<bf16>::new(), std::collections::HashMap::new());
        let mut place = |matrix: &Matrix| {
            *seen.entry(matrix.storage_key()).or_insert_with(|| {
                let [rows, cols] = matrix.shape();
                let (at, stride) = (numbers.len(), cols + numbers.len() % 3 * 5 / 2);
                for r in 0..rows {
                    numbers.extend((0..stride).map(|c| match c < cols {
                        true => bf16::from_f32(matrix.get(r, c)),
                        false => bf16::NAN,
                    }));
                }
                DeviceMatrix { address: 2 * at as u64, rows, cols, stride }
            })
        };
        let mut layers = BTreeMap::new();
        for (&n, layer) in weights.layers() {
            let experts = layer.experts().iter().map(|expert| {
                Projection::ALL.map(|p| {
                    let lora = expert.get(p).filter(|lora| lora.rank() > 0)?;
                    Some(DeviceLora { a: place(lora.a()), b: place(lora.b()), scale: lora.scale() })
                })
            });
            layers.insert(n, experts.collect::<DeviceLayer>());
        }
        numbers.push(bf16::NAN); // never empty
        let bytes = 2 * numbers.len();
        let (staging, matrices) = (gpu.alloc(bytes).unwrap(), gpu.alloc(bytes).unwrap());
        stream.upload(&staging, 0, &numbers).unwrap();
        stream.fill(&matrices, 0, bytes, 0xff).unwrap();
        for lora in layers.values_mut().flatten().flatten().flatten() {
            lora.a.address += matrices.address();
            lora.b.address += matrices.address();
        }
        // SAFETY: both buffers live until the stream was waited for.
        let weights = unsafe { DeviceWeights::new(DType::Bf16, layers, stream) };
        Self { staging, matrices, weights }
    }

    /// Gives the stream work that writes the matrices, the work between, then work that spoils them.
    fn written_for<R>(&self, stream: &Stream, between: impl FnOnce(&DeviceWeights) -> R) -> R {
        let bytes = self.matrices.bytes();
        // SAFETY: both buffers are `bytes` long and this stream's alone.
        unsafe { stream.copy_rows_async((self.matrices.address(), bytes), (self.staging.address(), bytes), bytes, 1) }
            .unwrap();
        let result = between(&self.weights);
        stream.fill(&self.matrices, 0, bytes, 0xff).unwrap();
        result
    }
}

#[test]
fn what_is_replaced_from_gpu_memory_is_what_the_host_would_bring_and_batches_in_flight_keep_theirs() {
    let Some(gpu) = testing::gpu("pool device weights") else { return };
    let config = PoolConfig { bytes: 1 << 20, device_slots: 3, ..Default::default() };
    let (device, host) = (pool(&gpu, config), pool(&gpu, config));
    let (trainer, reader) = (gpu.stream().unwrap(), gpu.stream().unwrap());
    let first = OnDevice::new(&gpu, &adapter(1, 24), &trainer);
    let id = first.written_for(&trainer, |weights| device.load_device("rl", weights)).unwrap();
    host.load("rl", adapter(1, 24)).unwrap();
    let mut steps = vec![first];
    let mut waited = 0;
    for seed in 2..14 {
        let old = lease(&device, &[id]);
        old.wait_on(&reader).unwrap();
        let next = OnDevice::new(&gpu, &adapter(seed, 24), &trainer);
        let busy = occupy(&gpu, &trainer);
        let written = next.written_for(&trainer, |weights| {
            assert_eq!(device.replace_device("rl", weights).unwrap(), id);
            trainer.record(false).unwrap()
        });
        waited += usize::from(!written.is_done().unwrap());
        let new = lease(&device, &[id]);
        assert_ne!(old.device_slots(), new.device_slots());
        assert_holds(&device, &old, old.device_slots()[0], &adapter(seed - 1, 24));
        assert_holds(&device, &new, new.device_slots()[0], &adapter(seed, 24));
        host.replace("rl", adapter(seed, 24)).unwrap();
        let (ours, theirs) = (&device.snapshot().adapters[0], &host.snapshot().adapters[0]);
        assert_eq!((ours.version, ours.bytes, ours.max_rank), (seed, theirs.bytes, theirs.max_rank));
        trainer.synchronize().unwrap();
        drop(busy);
        steps.push(next);
    }
    assert!(waited > 0, "the host waited for the training step every time");
}

#[test]
fn a_full_pool_is_replaced_in_place_behind_its_readers() {
    let Some(gpu) = testing::gpu("pool device weights in place") else { return };
    let most = (1..9).map(|seed| super::super::CudaStore::bytes(&adapter(seed, 24))).max().unwrap();
    let pool = pool(&gpu, PoolConfig { bytes: most, device_slots: 1, ..Default::default() });
    let (trainer, reader) = (gpu.stream().unwrap(), gpu.stream().unwrap());
    let id = pool.load("rl", adapter(1, 24)).unwrap();
    for seed in 2..9 {
        let next = OnDevice::new(&gpu, &adapter(seed, 24), &trainer);
        let old = lease(&pool, &[id]);
        let refused = next.written_for(&trainer, |weights| pool.replace_device("rl", weights)).unwrap_err();
        assert!(matches!(refused, PoolError::NoRoom { .. } | PoolError::NoSlot { .. }), "{refused}");
        old.wait_on(&reader).unwrap();
        let _busy = occupy(&gpu, &reader);
        let end = reader.record(false).unwrap();
        drop(old);
        next.written_for(&trainer, |weights| pool.replace_device("rl", weights)).unwrap();
        let new = lease(&pool, &[id]);
        assert_holds(&pool, &new, 0, &adapter(seed, 24));
        assert!(end.is_done().unwrap(), "the copy did not wait for the reader");
        trainer.synchronize().unwrap();
    }
}

#[test]
fn what_does_not_fit_the_model_is_refused_and_changes_nothing() {
    let Some(gpu) = testing::gpu("pool device weights refused") else { return };
    let pool = pool(&gpu, PoolConfig { bytes: 1 << 20, max_rank: 16, ..Default::default() });
    let stream = gpu.stream().unwrap();
    let buffer = gpu.alloc(1 << 16).unwrap();
    let matrix = |rows, cols| DeviceMatrix { address: buffer.address(), rows, cols, stride: cols };
    let good = DeviceLora { a: matrix(4, 64), b: matrix(40, 4), scale: 0.5 };
    let load = |dtype, layer, change: &dyn Fn(&mut DeviceLayer)| {
        let mut experts: DeviceLayer = vec![[None; 3]; model().layer.num_experts];
        experts[2][1] = Some(good);
        change(&mut experts);
        // SAFETY: nothing of it is copied: it is wrong, or the numbers of a live buffer.
        pool.load_device("x", &unsafe { DeviceWeights::new(dtype, [(layer, experts)].into(), &stream) })
    };
    let before = pool.snapshot();
    let wrong = |change: &dyn Fn(&mut DeviceLora)| {
        let error = load(DType::Bf16, 3, &|experts| experts[2][1].iter_mut().for_each(change)).unwrap_err();
        let text = error.input().unwrap().to_string();
        assert!(text.contains("adapter \"x\" layer 3 expert 2 up"), "{text}");
        assert_eq!(pool.snapshot(), before);
    };
    wrong(&|lora| lora.a.cols = 40);
    wrong(&|lora| lora.b.rows = 64);
    wrong(&|lora| lora.b.cols = 3);
    wrong(&|lora| (lora.a.rows, lora.b.cols, lora.b.stride) = (17, 17, 17));
    wrong(&|lora| (lora.a.rows, lora.b.cols) = (0, 0));
    wrong(&|lora| lora.a.stride = 63);
    wrong(&|lora| lora.b.stride = usize::MAX);
    wrong(&|lora| lora.a.address = 0);
    wrong(&|lora| lora.a.address += 1);
    wrong(&|lora| lora.scale = f32::NAN);
    for (dtype, layer, experts) in [(DType::F16, 3, 5), (DType::Bf16, 2, 5), (DType::Bf16, 3, 4)] {
        let error = load(dtype, layer, &|all| all.truncate(experts)).unwrap_err();
        assert!(error.input().is_some() && pool.snapshot() == before, "{error}");
    }
    let host = AdapterPool::new(HostMemory, &model(), PoolConfig::default()).unwrap();
    // SAFETY: it has no matrix.
    let nothing = unsafe { DeviceWeights::new(DType::Bf16, BTreeMap::new(), &stream) };
    assert!(host.load_device("x", &nothing).unwrap_err().input().is_some());
    pool.load_device("nothing", &nothing).unwrap();
    load(DType::Bf16, 3, &|_| ()).unwrap();
    assert_eq!(pool.replace_device("nobody", &nothing).unwrap_err(), PoolError::NotLoaded { name: "nobody".into() });
}
