//! Adapters by name: read by a thread of their own while others generate, held by the pool, forgotten with it.

use crate::{GenerateError, RequestError, decoder};
use moe_lora::adapter::{LinearAdapters, OpenOptions};
use moe_lora::model::DecoderConfig;
use moe_lora::{AdapterError, AdapterId, AdapterPool, DType, InputError, Lease, PeftAdapter, PoolError, TokenAdapters};
use std::collections::{HashMap, HashSet};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;

/// An adapter in use: nobody evicts it while this lives.
#[derive(Debug)]
pub(crate) struct Held {
    pub(crate) id: AdapterId,
    pub(crate) linear: Arc<LinearAdapters>,
    _lease: Lease,
}

/// Whether an adapter can be used now.
pub(crate) enum Status {
    Ready(Held),
    /// It is being read, or waits for room.
    Later,
}

/// A load that ended.
pub(crate) struct Loaded {
    pub(crate) name: String,
    pub(crate) result: Result<Ready, RequestError>,
}

/// What a load brings.
pub(crate) struct Ready {
    id: AdapterId,
    linear: LinearAdapters,
    /// So that the next load does not evict it before a request has it.
    lease: Lease,
    pub(crate) warnings: Vec<String>,
}

/// All adapters that requests may name.
#[derive(Debug)]
pub(crate) struct Adapters {
    pool: AdapterPool,
    folders: HashMap<String, PathBuf>,
    ready: HashMap<String, (AdapterId, Arc<LinearAdapters>)>,
    loading: HashSet<String>,
    /// Waiting until a request ends and its adapter can be evicted.
    crowded: HashSet<String>,
    /// Did not fit although no request was running.
    last_tries: HashSet<String>,
    /// Leases of what was loaded just now.
    fresh: Vec<Lease>,
    /// `None` only while this is dropped.
    jobs: Option<Sender<(String, PathBuf)>>,
    done: Receiver<Loaded>,
    thread: Option<JoinHandle<()>>,
}

impl Adapters {
    /// Starts the thread.
    pub(crate) fn new(
        pool: AdapterPool,
        config: DecoderConfig,
        dtype: DType,
        options: OpenOptions,
    ) -> Result<Self, GenerateError> {
        let (jobs, inbox) = channel::<(String, PathBuf)>();
        let (outbox, done) = channel();
        let reader = Reader { pool: pool.clone(), config, dtype, options };
        let work = move || {
            for (name, folder) in inbox {
                let result = reader.load(&name, &folder);
                if outbox.send(Loaded { name, result }).is_err() {
                    return;
                }
            }
        };
        let thread = std::thread::Builder::new().name("adapters".into()).spawn(work).map_err(GenerateError::Thread)?;
        Ok(Self {
            pool,
            folders: HashMap::new(),
            ready: HashMap::new(),
            loading: HashSet::new(),
            crowded: HashSet::new(),
            last_tries: HashSet::new(),
            fresh: Vec::new(),
            jobs: Some(jobs),
            done,
            thread: Some(thread),
        })
    }

    pub(crate) fn register(&mut self, name: &str, folder: PathBuf) {
        self.folders.insert(name.to_owned(), folder);
    }

    pub(crate) fn is_known(&self, name: &str) -> bool {
        self.folders.contains_key(name)
    }

    pub(crate) const fn pool(&self) -> &AdapterPool {
        &self.pool
    }

    /// Bytes of what adapters change outside the experts.
    pub(crate) fn linear_bytes(&self) -> usize {
        self.ready.values().map(|(_, linear)| linear.size_bytes()).sum()
    }

    /// Takes an adapter into use, or has it read.
    pub(crate) fn hold(&mut self, name: &str) -> Status {
        if let Some((id, linear)) = self.ready.get(name) {
            if let Ok(lease) = self.pool.lease(&TokenAdapters::from_ids(&[Some(*id)])) {
                return Status::Ready(Held { id: *id, linear: linear.clone(), _lease: lease });
            }
            // Evicted for another one.
            self.ready.remove(name);
        }
        if !self.loading.contains(name)
            && !self.crowded.contains(name)
            && let (Some(folder), Some(jobs)) = (self.folders.get(name), &self.jobs)
            && jobs.send((name.to_owned(), folder.clone())).is_ok()
        {
            self.loading.insert(name.to_owned());
        }
        Status::Later
    }

    /// A load that ended since the last call. With `wait`, and while any is under way, waits for one.
    pub(crate) fn loaded(&mut self, wait: bool) -> Option<Loaded> {
        let loaded = if wait && !self.loading.is_empty() { self.done.recv().ok() } else { self.done.try_recv().ok() }?;
        self.loading.remove(&loaded.name);
        Some(loaded)
    }

    /// Keeps what was loaded, and forgets what the pool evicted for it. Returns the bytes in the pool and outside.
    pub(crate) fn keep(&mut self, name: &str, ready: Ready) -> [usize; 2] {
        let bytes = ready.linear.size_bytes();
        self.ready.insert(name.to_owned(), (ready.id, Arc::new(ready.linear)));
        self.fresh.push(ready.lease);
        self.last_tries.remove(name);
        let snapshot = self.pool.snapshot();
        let held: HashMap<AdapterId, usize> = snapshot.adapters.iter().map(|a| (a.id, a.bytes)).collect();
        self.ready.retain(|_, (id, _)| held.contains_key(id));
        [held.get(&ready.id).copied().unwrap_or_default(), bytes]
    }

    /// An adapter did not fit beside those in use: whether it is worth another try when one of them is free, which is so
    /// while requests are `running`, and once more after that.
    pub(crate) fn try_again(&mut self, name: &str, running: bool) -> bool {
        if running {
            self.crowded.insert(name.to_owned());
        }
        running || self.last_tries.insert(name.to_owned())
    }

    /// An adapter is no longer in use, so those that did not fit may try again.
    pub(crate) fn room_may_be_free(&mut self) {
        self.crowded.clear();
    }

    /// All requests that could take what was loaded have it now.
    pub(crate) fn settled(&mut self) {
        self.fresh.clear();
    }
}

impl Drop for Adapters {
    fn drop(&mut self) {
        self.jobs = None;
        if let Some(thread) = self.thread.take() {
            // A panic there was reported already; nothing is left to save.
            thread.join().ok();
        }
    }
}

/// What the thread needs.
struct Reader {
    pool: AdapterPool,
    config: DecoderConfig,
    dtype: DType,
    options: OpenOptions,
}

impl Reader {
    fn load(&self, name: &str, folder: &std::path::Path) -> Result<Ready, RequestError> {
        let bad_files = |error: AdapterError| RequestError::Adapter { name: name.to_owned(), error };
        let adapter = PeftAdapter::open_with(folder, self.options.clone()).map_err(bad_files)?;
        let weights = adapter.resolve(self.pool.shape()).map_err(bad_files)?;
        let shape_of = |layer: usize, module: &str| decoder::module_shape(&self.config, layer, module);
        let linear = adapter.resolve_linear(self.dtype, shape_of).map_err(bad_files)?;
        if let Some(tensor) = linear.left().first() {
            let found = format!("{} tensors that change what is not computed with adapters", linear.left().len());
            let expected = "experts, attention and dense layers only";
            return Err(bad_files(InputError::new(found, expected).in_tensor(tensor).in_file(folder).into()));
        }
        let held = self.pool.load(name, weights).and_then(|id| {
            let lease = self.pool.lease(&TokenAdapters::from_ids(&[Some(id)]))?;
            Ok((id, lease))
        });
        let (id, lease) = held.map_err(|error: PoolError| RequestError::Pool { name: name.to_owned(), error })?;
        Ok(Ready { id, lease, linear, warnings: adapter.warnings().to_vec() })
    }
}
