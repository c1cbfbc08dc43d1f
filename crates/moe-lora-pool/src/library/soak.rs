//! Threads that admit, lease, prefetch, pin, replace, register and forget, over a library that is too small for them, with
//! sources that fail, files that are torn and mangled meanwhile, and memory that is refused to the host and under the pool;
//! every number of every lease is checked. `MOE_LORA_SOAK` is the number of operations.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on may panic")]

use crate::{
    AdapterLibrary, AdapterPool, Admission, Held, HostMemory, LibraryConfig, PoolConfig, PoolError, Source, Tier,
};
use moe_lora_core::{
    AdapterLayer, AdapterWeights, DType, ExpertLora, InputError, LayerShape, Lora, Matrix, ModelShape, Projection,
    TokenAdapters,
};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::Duration;

const NAMES: u32 = 24;
/// The names from here on are folders of files.
const FILES: u32 = 18;
const THREADS: u64 = 4;
/// A version is `NAMES * n + name`: its scale and, modulo 251, every number of its matrices.
static VERSIONS: AtomicU32 = AtomicU32::new(1);
/// Requests that ended with an error that names a file.
static TORN: AtomicU32 = AtomicU32::new(0);

fn model() -> ModelShape {
    ModelShape::uniform(LayerShape::new(3, 1, 16, 8).unwrap(), 2, DType::F32)
}

fn weights(version: u32) -> AdapterWeights {
    let rank = 1 + (version % NAMES) as usize % 5;
    let number = (version % 251) as f32;
    let expert = || {
        let a = Matrix::from_vec(vec![number; rank * 8], rank, 8).unwrap();
        let b = Matrix::from_vec(vec![number; 16 * rank], 16, rank).unwrap();
        ExpertLora { down: Some(Lora::new(a, b, version as f32).unwrap()), ..Default::default() }
    };
    let layer = || AdapterLayer::new(&model().layer, (0..3).map(|_| expert()).collect()).unwrap();
    AdapterWeights::new(&model(), [(0, layer()), (1, layer())].into()).unwrap()
}

fn next_version(name: u32) -> u32 {
    VERSIONS.fetch_add(1, Ordering::Relaxed) * NAMES + name
}

/// Of files always the first version; else one read in eight fails, and every version that is read is a new one.
fn source(name: u32, files: &Path) -> Source {
    if name >= FILES {
        return Source::folder(folder(name, files));
    }
    Source::new(move || match next_version(name) {
        version if (version / NAMES).is_multiple_of(8) => Err(InputError::new("a torn file", "a whole one")),
        version => Ok(weights(version)),
    })
}

fn folder(name: u32, files: &Path) -> PathBuf {
    files.join(name.to_string())
}

/// The file of a name's first version: `[length, header, numbers]`.
fn file(name: u32) -> (Vec<u8>, usize) {
    let (mut header, mut numbers) = (String::new(), Vec::<u8>::new());
    for (&layer, weights) in weights(NAMES + name).layers() {
        for (e, expert) in weights.experts().iter().enumerate() {
            let down = expert.down.as_ref().unwrap();
            for (side, matrix) in [("A", down.a()), ("B", down.b())] {
                let begin = numbers.len();
                numbers.extend(matrix.to_vec::<f32>().iter().flat_map(|x| x.to_le_bytes()));
                let key = format!("base_model.model.model.layers.{layer}.mlp.experts.{e}.down_proj.lora_{side}.weight");
                let (shape, end) = (matrix.shape(), numbers.len());
                header += &format!(r#","{key}":{{"dtype":"F32","shape":{shape:?},"data_offsets":[{begin},{end}]}}"#);
            }
        }
    }
    let header = format!("{{{}}}", &header[1..]);
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(header.as_bytes());
    bytes.extend_from_slice(&numbers);
    (bytes, 8 + header.len())
}

/// Puts a folder's files in place: whole, cut short, or with a byte of the header changed. Loaders read meanwhile.
fn write_files(name: u32, files: &Path, rng: &mut fastrand::Rng, whole: bool) {
    let (mut bytes, header) = file(name);
    let rank = 1 + name % NAMES % 5;
    let alpha = (NAMES + name) * rank;
    let mut config =
        format!(r#"{{"peft_type":"LORA","r":{rank},"lora_alpha":{alpha},"target_modules":["down_proj"]}}"#);
    match if whole { 0 } else { rng.u8(..6) } {
        0..=2 => {}
        3 => bytes.truncate(rng.usize(..bytes.len())),
        4 => bytes[rng.usize(..header)] ^= rng.u8(1..),
        _ => config.truncate(rng.usize(..config.len())),
    }
    // Renamed, so that what a loader has opened stays as it is.
    let place = |file: &str, bytes: &[u8]| {
        let beside = files.join(temporary(name, file));
        std::fs::write(&beside, bytes).unwrap();
        std::fs::rename(&beside, folder(name, files).join(file)).unwrap();
    };
    place("adapter_model.safetensors", &bytes);
    place("adapter_config.json", config.as_bytes());
}

/// A name of its own for every thread that writes.
fn temporary(name: u32, file: &str) -> String {
    format!("{name}-{:?}-{file}", thread::current().id())
}

/// The batch of a request: whole versions of the right names, the same in all layers.
fn forward(pool: &AdapterPool, names: &[u32], held: &Held) {
    let ids = held.ids();
    let tokens: Vec<_> = ids.iter().copied().map(Some).collect();
    let lease = pool.lease(&TokenAdapters::from_ids(&tokens)).unwrap();
    let tables = [0, 1].map(|layer| lease.table(layer).unwrap());
    for (id, name) in ids.iter().zip(names) {
        let lora = |layer: usize, expert| tables[layer].get(id.slot as i32, expert, Projection::Down).unwrap();
        let version = lora(0, 0).scale() as u32;
        assert_eq!(version % NAMES, *name, "another adapter's weights");
        for (layer, expert) in [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)] {
            let lora = lora(layer, expert);
            assert_eq!(lora.scale() as u32, version, "two versions in one lease");
            for matrix in [lora.a(), lora.b()] {
                assert!(matrix.to_vec::<f32>().iter().all(|x| *x as u32 == version % 251), "a wrong number");
            }
        }
    }
}

fn worker(library: &AdapterLibrary, files: &Path, seed: u64, calls: usize) -> usize {
    let mut rng = fastrand::Rng::with_seed(seed);
    let mut running: Vec<(Vec<u32>, Held)> = Vec::new();
    let mut served = 0;
    for _ in 0..calls {
        let name = rng.u32(..NAMES);
        let text = name.to_string();
        match rng.u8(..21) {
            0..=8 => {
                let names: Vec<u32> = (0..rng.usize(1..3)).map(|_| rng.u32(..NAMES)).collect();
                let texts: Vec<String> = names.iter().map(u32::to_string).collect();
                let asked: Vec<&str> = texts.iter().map(String::as_str).collect();
                // Requests that are running could hold all there is while this one waits.
                let answer = library.admit(&asked).and_then(|answer| match answer {
                    Admission::Waiting(waiting) if rng.bool() => {
                        running.clear();
                        waiting.wait(Duration::from_secs(20))
                    }
                    Admission::Waiting(waiting) => waiting.poll(),
                    answer => Ok(answer),
                });
                match answer {
                    Ok(Admission::Ready(held)) => {
                        forward(library.pool(), &names, &held);
                        served += 1;
                        running.push((names, held));
                    }
                    Ok(Admission::Waiting(_) | Admission::Never { .. }) | Err(PoolError::NotRegistered { .. }) => {}
                    Err(PoolError::OutOfMemory { .. }) => {}
                    Err(PoolError::Input(input)) => {
                        TORN.fetch_add(input.file.is_some().into(), Ordering::Relaxed);
                    }
                    Err(error) => panic!("{error}"),
                }
            }
            9..=12 => {
                if let Some((names, held)) = running.pop() {
                    forward(library.pool(), &names, &held);
                }
            }
            13 => drop(library.prefetch(&text, if rng.bool() { Tier::Pool } else { Tier::Host })),
            14 => drop(library.pin(&text)),
            15 | 16 => drop(library.unpin(&text)),
            17 => match library.replace(&text, &weights(next_version(name))) {
                Ok(version) => assert!(version > 1),
                Err(
                    PoolError::Busy { .. }
                    | PoolError::NotRegistered { .. }
                    | PoolError::NoRoom { .. }
                    | PoolError::OutOfMemory { .. },
                ) => {}
                Err(error) => panic!("{error}"),
            },
            18 => match library.unregister(&text) {
                Ok(()) | Err(PoolError::Busy { .. } | PoolError::NotRegistered { .. }) => {}
                Err(error) => panic!("{error}"),
            },
            19 => write_files(rng.u32(FILES..NAMES), files, &mut rng, false),
            _ => match library.register(&text, source(name, files)) {
                Ok(()) | Err(PoolError::AlreadyLoaded { .. }) => {}
                Err(error) => panic!("{error}"),
            },
        }
        while running.len() > 2 {
            running.remove(0);
        }
        if rng.u8(..64) == 0 {
            let snapshot = library.snapshot();
            assert!(snapshot.pool.used_bytes <= snapshot.pool.budget_bytes);
        }
    }
    served
}

#[test]
fn threads_see_whole_versions_and_nothing_leaks() {
    let calls = std::env::var("MOE_LORA_SOAK").ok().and_then(|n| n.parse().ok()).unwrap_or(100_000);
    let one = weights(4).size_bytes(); // the largest rank
    let pool = AdapterPool::new(HostMemory, &model(), PoolConfig { bytes: 6 * one, ..Default::default() }).unwrap();
    let config = LibraryConfig { host_bytes: 10 * one, loaders: 2, patience: 8 };
    let library = AdapterLibrary::new(pool, config).unwrap();
    library.pool().shared.faults.one_in.store(32, Ordering::Relaxed);
    let files = tempfile::tempdir().unwrap();
    let files = files.path();
    for name in 0..NAMES {
        if name >= FILES {
            std::fs::create_dir(folder(name, files)).unwrap();
            write_files(name, files, &mut fastrand::Rng::new(), true);
        }
        library.register(&name.to_string(), source(name, files)).unwrap();
    }
    let served: usize = thread::scope(|scope| {
        let workers: Vec<_> = (0..THREADS)
            .map(|seed| {
                let library = &library;
                scope.spawn(move || worker(library, files, seed, calls / THREADS as usize))
            })
            .collect();
        workers.into_iter().map(|worker| worker.join().unwrap()).sum()
    });
    let snapshot = library.snapshot();
    assert!(served > calls / 20, "{served} served\n{snapshot}");
    assert!(snapshot.counters.failures > 0 && snapshot.pool.evictions > 0 && snapshot.counters.replaces > 0);
    assert!(snapshot.waiting == 0 && snapshot.adapters.iter().all(|adapter| adapter.holds == 0), "{snapshot}");
    let faults = library.pool().shared.faults.calls.each_ref().map(|calls| calls.load(Ordering::Relaxed) / 32);
    let torn = TORN.load(Ordering::Relaxed);
    println!(
        "{served} served, {} loads failed, {torn} requests for torn files, memory refused (host, pool) {faults:?}",
        snapshot.counters.failures
    );
    assert!(faults.iter().all(|&n| n > 0) && torn > 0, "{faults:?}");
    // What was torn is mended, and then every adapter can be had, whole.
    library.pool().shared.faults.one_in.store(0, Ordering::Relaxed);
    for name in FILES..NAMES {
        let text = name.to_string();
        while let Err(PoolError::Busy { .. }) = library.unregister(&text) {
            thread::sleep(Duration::from_millis(1));
        }
        write_files(name, files, &mut fastrand::Rng::new(), true);
        library.register(&text, source(name, files)).unwrap();
        let answer = match library.admit(&[&text]).unwrap() {
            Admission::Waiting(waiting) => waiting.wait(Duration::from_secs(20)).unwrap(),
            answer => answer,
        };
        let Admission::Ready(held) = answer else { panic!("{answer:?}") };
        forward(library.pool(), &[name], &held);
    }
    let snapshot = library.snapshot();
    for adapter in &snapshot.adapters {
        let mut tries = 0;
        while let Err(PoolError::Busy { .. }) = library.unregister(&adapter.name) {
            tries += 1;
            assert!(tries < 10_000, "{adapter:?} stays busy");
            thread::sleep(Duration::from_millis(1));
        }
    }
    let snapshot = library.snapshot();
    assert_eq!((snapshot.host_bytes, snapshot.pool.used_bytes, snapshot.adapters.len()), (0, 0, 0));
}
