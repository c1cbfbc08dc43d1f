//! Why a collective did not happen.

use std::path::PathBuf;
use std::time::Duration;

/// A collective that did not happen; what it should have written is unspecified.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CollectiveError {
    /// A rank could not bring its part. The group goes on with the next collective.
    #[error("rank {rank} failed: {reason}")]
    PeerFailed {
        /// The first such rank.
        rank: usize,
        /// In its words.
        reason: String,
    },
    /// A rank left before this collective: its thread ended or panicked.
    #[error("rank {rank} is gone")]
    PeerGone {
        /// The first such rank.
        rank: usize,
    },
    /// The group was ended, here or on another rank.
    #[error("the group of ranks was ended: {reason}")]
    Aborted {
        /// In the words of whoever ended it.
        reason: String,
    },
    /// Not all ranks came in time.
    #[error("{what}: not all ranks came within {after:?}")]
    TimedOut {
        /// What was being done.
        what: String,
        /// How long.
        after: Duration,
    },
    /// Ranks called different collectives.
    #[error("rank {rank} brought {found} values, rank 0 {expected}")]
    Mismatch {
        /// The rank that differs.
        rank: usize,
        /// Its values.
        found: usize,
        /// Those of rank 0.
        expected: usize,
    },
    /// The ranks could not meet.
    #[error("meeting at {place}: {reason}")]
    Rendezvous {
        /// The file or address.
        place: String,
        /// Why.
        reason: String,
    },
    /// The file that ranks were to meet at is there already.
    #[error("{}: found a file, expected none: every start needs a name of its own", path.display())]
    StaleRendezvous {
        /// The file.
        path: PathBuf,
    },
    /// NCCL failed.
    #[cfg(feature = "cuda")]
    #[error(transparent)]
    Nccl(#[from] moe_lora_cuda::NcclError),
    /// A GPU failed.
    #[cfg(feature = "cuda")]
    #[error(transparent)]
    Gpu(#[from] moe_lora_cuda::GpuError),
}
