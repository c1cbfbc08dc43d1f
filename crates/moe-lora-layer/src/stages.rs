//! The runner behind a layer.

use crate::LayerError;
use moe_lora_collective::Communicator;
use moe_lora_core::{DType, Element, InputError, LayerWeights};
#[cfg(feature = "cuda")]
use moe_lora_cuda::{DeviceBuffer, Stream};
#[cfg(feature = "cuda")]
use moe_lora_pool::CudaMemory;
use moe_lora_pool::Lease;
use moe_lora_runner::{Batch, Device, Limits, MoeRunner};
#[cfg(feature = "cuda")]
use moe_lora_runner::{CudaRunner, CudaWeights};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Where a layer runs. Layers of one shape can share the runner, and with it the workspace.
#[derive(Debug)]
pub(crate) enum Stages {
    Cpu(Arc<Mutex<MoeRunner>>),
    #[cfg(feature = "cuda")]
    Cuda {
        weights: Arc<CudaWeights>,
        runner: Arc<Mutex<CudaRunner>>,
    },
}

impl Stages {
    /// `adapters` is the format of the model that the pool serves.
    pub(crate) fn new(
        device: &Device,
        weights: &LayerWeights,
        adapters: DType,
        limits: Limits,
    ) -> Result<Self, LayerError> {
        #[cfg(feature = "cuda")]
        if let Some(gpu) = device.gpu() {
            let [found, want] = [adapters, weights.dtype()].map(CudaMemory::dtype);
            if found != want {
                return Err(InputError::new(format!("a pool in {found}"), format!("one in {want}")).into());
            }
            let runner = CudaRunner::new(gpu, weights.shape(), limits)?;
            let weights = Arc::new(CudaWeights::upload(gpu, weights)?);
            return Ok(Self::Cuda { weights, runner: Arc::new(Mutex::new(runner)) });
        }
        let _ = (device, adapters);
        Ok(Self::Cpu(Arc::new(Mutex::new(MoeRunner::new(weights.shape(), limits)?))))
    }

    /// Takes over another layer's runner, which is for the same shape.
    pub(crate) fn share(&mut self, other: &Self) -> Result<(), InputError> {
        match (self, other) {
            (Self::Cpu(mine), Self::Cpu(other)) => *mine = Arc::clone(other),
            #[cfg(feature = "cuda")]
            // The runner checks at every forward that the weights are on its GPU.
            (Self::Cuda { runner: mine, .. }, Self::Cuda { runner: other, .. }) => *mine = Arc::clone(other),
            #[cfg(feature = "cuda")]
            _ => return Err(InputError::new("layers on different devices", "layers on one device")),
        }
        Ok(())
    }

    pub(crate) fn workspace_bytes(&self) -> usize {
        match self {
            Self::Cpu(runner) => lock(runner).workspace_bytes(),
            #[cfg(feature = "cuda")]
            Self::Cuda { runner, .. } => lock(runner).workspace_bytes(),
        }
    }

    /// Weights and runner on a GPU.
    #[cfg(feature = "cuda")]
    pub(crate) fn cuda(&self) -> Result<(&Arc<CudaWeights>, &Arc<Mutex<CudaRunner>>), InputError> {
        match self {
            Self::Cpu(_) => Err(InputError::new("a layer on the CPU", "one on a GPU")),
            Self::Cuda { weights, runner } => Ok((weights, runner)),
        }
    }

    /// One layer whose adapters are those of `lease` at decoder layer `index`; it is done when this returns.
    pub(crate) fn forward<X: Element, Y: Element>(
        &self,
        weights: &LayerWeights,
        batch: Batch<'_, X, ()>,
        (lease, index): (&Lease, usize),
        out: &mut [Y],
    ) -> Result<(), LayerError> {
        match self {
            Self::Cpu(runner) => {
                let adapters = &lease.table(index)?;
                lock(runner).forward(weights, &batch.with_adapters(adapters), out)?;
            }
            #[cfg(feature = "cuda")]
            Self::Cuda { weights, runner } => {
                let adapters = &lease.device_table(index)?;
                let batch = Batch { token_slots: adapters.token_slots(), ..batch };
                lock(runner).forward(weights, &batch.with_adapters(adapters), out)?;
            }
        }
        Ok(())
    }

    /// [`forward`](Self::forward), summed over all ranks: in GPU memory if they can, else in the host's.
    pub(crate) fn forward_reduced<X: Element>(
        &self,
        weights: &LayerWeights,
        batch: Batch<'_, X, ()>,
        (lease, index): (&Lease, usize),
        ranks: &dyn Communicator,
        out: &mut [f32],
    ) -> Result<(), LayerError> {
        #[cfg(feature = "cuda")]
        if let (Self::Cuda { weights, runner }, Some(ranks)) = (self, ranks.gpu()) {
            let adapters = &lease.device_table(index)?;
            let batch = Batch { token_slots: adapters.token_slots(), ..batch };
            let reduce = |stream: &Stream, buffer: &DeviceBuffer, offset, count| {
                ranks.all_reduce_on(stream, buffer, offset, count)?;
                Ok::<_, LayerError>(ranks.wait(stream)?)
            };
            return lock(runner).forward_reduced(weights, &batch.with_adapters(adapters), reduce, out);
        }
        self.forward(weights, batch, (lease, index), out)?;
        Ok(ranks.all_reduce(out)?)
    }
}

/// A panic in another thread's forward leaves scratch that the next forward overwrites anyway.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
