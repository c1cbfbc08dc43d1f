//! What every group of ranks can do.

use crate::CollectiveError;
#[cfg(feature = "cuda")]
use moe_lora_cuda::{DeviceBuffer, Stream};
use std::fmt;

/// One rank's end of a group.
///
/// All ranks call the same collectives in the same order. Dropping the last handle of a rank takes it out of the group.
pub trait Communicator: fmt::Debug + Send + Sync {
    /// This rank, from 0.
    fn rank(&self) -> usize;

    /// All ranks.
    fn size(&self) -> usize;

    /// Replaces `values` by their sums over all ranks; returns when they are there.
    ///
    /// # Errors
    /// If another rank failed, is gone or brought another number of values, or the group was aborted.
    fn all_reduce(&self, values: &mut [f32]) -> Result<(), CollectiveError>;

    /// Says that this rank cannot bring its part to the collective that the others are at or will come to next; they get an
    /// error. Instead of that collective, and only then. Groups that cannot carry a word end: the default is
    /// [`abort`](Self::abort).
    fn fail(&self, reason: &str) {
        self.abort(reason);
    }

    /// Ends the group: every collective under way or to come is an error on every rank.
    fn abort(&self, reason: &str);

    /// Collectives in GPU memory, if this group has them.
    #[cfg(feature = "cuda")]
    fn gpu(&self) -> Option<&dyn GpuCommunicator> {
        None
    }
}

/// Collectives in the order of a GPU's stream, which the host does not wait for.
#[cfg(feature = "cuda")]
pub trait GpuCommunicator: fmt::Debug + Send + Sync {
    /// Replaces `count` f32 values from byte `offset` of `buffer` on by their sums over all ranks. Can be captured into a graph.
    ///
    /// # Errors
    /// If the range or the stream does not fit, or the group has ended.
    fn all_reduce_on(
        &self,
        stream: &Stream,
        buffer: &DeviceBuffer,
        offset: usize,
        count: usize,
    ) -> Result<(), CollectiveError>;

    /// Waits for the stream, but not for ever: a rank that is gone ends the group, and then this is an error.
    ///
    /// # Errors
    /// If the group has ended, or what failed on the GPU.
    fn wait(&self, stream: &Stream) -> Result<(), CollectiveError>;
}

/// A group of one.
#[derive(Debug, Clone, Copy, Default)]
pub struct Single;

impl Communicator for Single {
    fn rank(&self) -> usize {
        0
    }

    fn size(&self) -> usize {
        1
    }

    fn all_reduce(&self, _values: &mut [f32]) -> Result<(), CollectiveError> {
        Ok(())
    }

    fn abort(&self, _reason: &str) {}
}
