//! The runner behind a layer.

use crate::LayerError;
use moe_lora_collective::{CollectiveError, Communicator};
use moe_lora_core::{DType, Element, InputError, LayerWeights};
#[cfg(feature = "cuda")]
use moe_lora_cuda::{DeviceBuffer, Stream};
#[cfg(feature = "cuda")]
use moe_lora_pool::CudaMemory;
use moe_lora_pool::Lease;
use moe_lora_runner::{Batch, Device, Limits, MoeRunner};
#[cfg(feature = "cuda")]
use moe_lora_runner::{CudaRunner, CudaWeights, RunnerError, Sum, Sums};
use std::cell::Cell;
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

    /// [`forward`](Self::forward) of one of several ranks: `group` exchanges what lies between A and B of fully sharded adapters,
    /// `all` sums the output; in GPU memory if they can, else in the host's.
    pub(crate) fn forward_together<X: Element>(
        &self,
        weights: &LayerWeights,
        batch: Batch<'_, X, ()>,
        (lease, index): (&Lease, usize),
        (all, group): (Option<&Group<'_>>, Option<&Group<'_>>),
        out: &mut [f32],
    ) -> Result<(), LayerError> {
        match self {
            Self::Cpu(runner) => {
                let adapters = &lease.table(index)?;
                let batch = batch.with_adapters(adapters);
                match group {
                    None => lock(runner).forward(weights, &batch, out)?,
                    Some(group) => lock(runner).forward_exchanging(weights, &batch, |s| group.sum(s), out)?,
                }
                all.map_or(Ok(()), |all| all.sum(out))
            }
            #[cfg(feature = "cuda")]
            Self::Cuda { weights, runner } => {
                let adapters = &lease.device_table(index)?;
                let batch = Batch { token_slots: adapters.token_slots(), ..batch }.with_adapters(adapters);
                let mut exchange = group.map(|group| {
                    move |stream: &Stream, buffer: &DeviceBuffer, offset, count| {
                        group.sum_on(stream, buffer, offset, count)
                    }
                });
                let mut finish = |stream: &Stream, buffer: &DeviceBuffer, offset, count| {
                    all.map_or(Ok(()), |all| all.sum_on(stream, buffer, offset, count))?;
                    Group::wait([all, group], stream)
                };
                let sums = Sums {
                    adapters: exchange.as_mut().map(|exchange| exchange as Sum<'_, LayerError>),
                    out: Some(&mut finish),
                };
                lock(runner).forward_together(weights, &batch, sums, out)
            }
        }
    }

    /// How many pieces a batch runs in, and how often [`forward_together`](Self::forward_together) sums its output.
    pub(crate) fn pieces(&self, tokens: usize) -> (usize, usize) {
        match self {
            Self::Cpu(runner) => (tokens.div_ceil(lock(runner).limits().max_tokens), 1),
            #[cfg(feature = "cuda")]
            Self::Cuda { runner, .. } => {
                let pieces = tokens.div_ceil(lock(runner).limits().max_tokens);
                (pieces, pieces)
            }
        }
    }
}

/// One rank's end of a group during one forward.
pub(crate) struct Group<'a> {
    communicator: &'a dyn Communicator,
    /// Sums that came about.
    done: Cell<usize>,
    failed: Cell<bool>,
}

impl<'a> Group<'a> {
    pub(crate) const fn new(communicator: &'a dyn Communicator) -> Self {
        Self { communicator, done: Cell::new(0), failed: Cell::new(false) }
    }

    /// Tells the others, unless they know or are past all of the forward's `sums`.
    pub(crate) fn fail(&self, sums: usize, reason: &str) {
        if !self.failed.get() && self.done.get() < sums {
            self.communicator.fail(reason);
        }
    }

    fn sum(&self, values: &mut [f32]) -> Result<(), LayerError> {
        self.count(self.communicator.all_reduce(values))
    }

    fn count(&self, summed: Result<(), CollectiveError>) -> Result<(), LayerError> {
        match &summed {
            Ok(()) => self.done.set(self.done.get() + 1),
            Err(_) => self.failed.set(true),
        }
        Ok(summed?)
    }

    #[cfg(feature = "cuda")]
    fn sum_on(&self, stream: &Stream, buffer: &DeviceBuffer, offset: usize, count: usize) -> Result<(), LayerError> {
        match self.communicator.gpu() {
            Some(_) if count == 0 => self.count(Ok(())),
            Some(gpu) => self.count(gpu.all_reduce_on(stream, buffer, offset, count)),
            None => {
                let mut values = vec![0.0_f32; count];
                stream.download(buffer, offset, &mut values).map_err(RunnerError::from)?;
                self.sum(&mut values)?;
                Ok(stream.upload(buffer, offset, &values).map_err(RunnerError::from)?)
            }
        }
    }

    /// Waits for the stream, but not for ever: a rank that is gone ends all groups, as any may be what the stream waits for.
    #[cfg(feature = "cuda")]
    fn wait(groups: [Option<&Self>; 2], stream: &Stream) -> Result<(), LayerError> {
        let waited = groups.into_iter().flatten().filter_map(|g| g.communicator.gpu()).try_for_each(|g| g.wait(stream));
        if let Err(error) = &waited {
            for group in groups.into_iter().flatten() {
                group.failed.set(true);
                group.communicator.abort(&error.to_string());
            }
        }
        Ok(waited?)
    }
}

/// A panic in another thread's forward leaves scratch that the next forward overwrites anyway.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
