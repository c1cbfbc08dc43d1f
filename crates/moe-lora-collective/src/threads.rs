//! Ranks that are threads of one process.

use crate::{CollectiveError, Communicator};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// A rank of a group of threads. Sums are in the order of ranks and have the same bits on every rank.
///
/// Each thread takes its own handle and drops it when it ends, also by a panic, so that nobody waits for it. A collective
/// blocks its thread: ranks must not be tasks of a thread pool with fewer threads than ranks.
#[derive(Debug)]
pub struct ThreadCommunicator {
    rank: usize,
    group: Arc<Group>,
}

#[derive(Debug)]
struct Group {
    size: usize,
    patience: Option<Duration>,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug)]
struct State {
    /// Collectives that all ranks came to.
    done: u64,
    /// What ranks brought to the next one.
    brought: Vec<Option<Result<Vec<f32>, String>>>,
    /// Of the last one. The next cannot end before all have read it, as it needs them all.
    outcome: Arc<Result<Vec<f32>, CollectiveError>>,
    gone: Vec<bool>,
    aborted: Option<CollectiveError>,
}

impl ThreadCommunicator {
    /// All ranks of a new group, in order. They wait for each other as long as all live.
    #[must_use]
    pub fn group(size: usize) -> Vec<Self> {
        Self::new_group(size, None)
    }

    /// [`group`](Self::group), whose collectives fail on all ranks if one does not come within `patience`.
    #[must_use]
    pub fn group_with_patience(size: usize, patience: Duration) -> Vec<Self> {
        Self::new_group(size, Some(patience))
    }

    fn new_group(size: usize, patience: Option<Duration>) -> Vec<Self> {
        let state = State {
            done: 0,
            brought: vec![None; size],
            outcome: Arc::new(Ok(Vec::new())),
            gone: vec![false; size],
            aborted: None,
        };
        let group = Arc::new(Group { size, patience, state: Mutex::new(state), changed: Condvar::new() });
        (0..size).map(|rank| Self { rank, group: Arc::clone(&group) }).collect()
    }

    // Each change under the lock is whole: a poisoned lock is as good.
    fn state(&self) -> MutexGuard<'_, State> {
        self.group.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Brings this rank's part to the next collective; the number of that collective.
    fn bring(&self, part: Result<Vec<f32>, String>) -> Result<u64, CollectiveError> {
        // A rank that failed did not wait; its part of the last collective may still be there.
        let mut state = self.wait_until(self.state(), |state| state.brought[self.rank].is_none())?;
        // Those who gave up left their parts behind, which must not become a sum.
        if let Some(error) = &state.aborted {
            return Err(error.clone());
        }
        state.brought[self.rank] = Some(part);
        let number = state.done;
        if state.brought.iter().all(Option::is_some) {
            let parts = state.brought.iter_mut().map_while(Option::take).collect();
            state.outcome = Arc::new(sum(parts));
            state.done += 1;
            self.group.changed.notify_all();
        }
        Ok(number)
    }

    /// Waits, but not for a rank that will not come: that ends the group.
    fn wait_until<'a>(
        &'a self,
        mut state: MutexGuard<'a, State>,
        ready: impl Fn(&State) -> bool,
    ) -> Result<MutexGuard<'a, State>, CollectiveError> {
        let start = Instant::now();
        loop {
            if ready(&state) {
                return Ok(state);
            }
            if let Some(error) = &state.aborted {
                return Err(error.clone());
            }
            let missing = (0..self.group.size).find(|&rank| state.gone[rank] && state.brought[rank].is_none());
            let late = self.group.patience.filter(|patience| start.elapsed() >= *patience);
            let ended = match (missing, late) {
                (Some(rank), _) => Some(CollectiveError::PeerGone { rank }),
                (None, Some(after)) => Some(CollectiveError::TimedOut { what: "an all-reduce".into(), after }),
                (None, None) => None,
            };
            if let Some(error) = ended {
                self.end(&mut state, error);
                continue;
            }
            state = match self.group.patience {
                None => self.group.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
                Some(patience) => {
                    let left = patience.saturating_sub(start.elapsed());
                    self.group.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0
                }
            };
        }
    }

    fn end(&self, state: &mut State, error: CollectiveError) {
        state.aborted.get_or_insert(error);
        self.group.changed.notify_all();
    }
}

/// Sums in the order of ranks.
fn sum(parts: Vec<Result<Vec<f32>, String>>) -> Result<Vec<f32>, CollectiveError> {
    let mut total: Option<Vec<f32>> = None;
    for (rank, part) in parts.into_iter().enumerate() {
        let part = part.map_err(|reason| CollectiveError::PeerFailed { rank, reason })?;
        match &mut total {
            None => total = Some(part),
            Some(total) if total.len() == part.len() => total.iter_mut().zip(part).for_each(|(sum, v)| *sum += v),
            Some(total) => {
                return Err(CollectiveError::Mismatch { rank, found: part.len(), expected: total.len() });
            }
        }
    }
    Ok(total.unwrap_or_default())
}

impl Communicator for ThreadCommunicator {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.group.size
    }

    fn all_reduce(&self, values: &mut [f32]) -> Result<(), CollectiveError> {
        let number = self.bring(Ok(values.to_vec()))?;
        let state = self.wait_until(self.state(), |state| state.done > number)?;
        let outcome = Arc::clone(&state.outcome);
        drop(state);
        match &*outcome {
            Ok(sums) => values.copy_from_slice(sums),
            Err(error) => return Err(error.clone()),
        }
        Ok(())
    }

    fn fail(&self, reason: &str) {
        // A group that has ended needs no word.
        let _ = self.bring(Err(reason.to_owned()));
    }

    fn abort(&self, reason: &str) {
        self.end(&mut self.state(), CollectiveError::Aborted { reason: reason.to_owned() });
    }
}

impl Drop for ThreadCommunicator {
    fn drop(&mut self) {
        self.state().gone[self.rank] = true;
        self.group.changed.notify_all();
    }
}
