//! The accounts under every order of calls that a scheduler can think of: threads that load, lease, replace and unload, each
//! call in the same separate steps under the lock as in `Claim` and `Lease`, with a memory that notices double use.

use super::*;
use shuttle::rand::{Rng, thread_rng};
use shuttle::sync::{Arc, Mutex};
use shuttle::thread;
use std::collections::HashMap;

const BUDGET: usize = 100;
const ROWS: usize = 3;

/// What really lies in memory: bytes and the readers of every row that was written and not freed.
#[derive(Default)]
struct Memory {
    rows: HashMap<u32, Version>,
}

#[derive(Clone)]
struct Version {
    bytes: usize,
    slot: u32,
    readers: usize,
    /// Its ticket is open: nobody can lease it yet.
    pending: bool,
    /// Nobody new can lease it.
    left: bool,
}

struct World {
    policy: Policy,
    memory: Memory,
}

impl World {
    fn write(&mut self, row: u32, slot: u32, bytes: usize) {
        let version = Version { bytes, slot, readers: 0, pending: true, left: false };
        assert!(self.memory.rows.insert(row, version).is_none(), "row {row} still holds another version");
        let held: usize = self.memory.rows.values().map(|version| version.bytes).sum();
        assert!(held <= BUDGET && self.memory.rows.len() <= ROWS, "{held} bytes in {} rows", self.memory.rows.len());
    }

    /// The slots' current versions can no longer be leased; they are freed now or by their last reader.
    fn leave(&mut self, slots: &[u32], but: Option<u32>) {
        for (row, version) in &mut self.memory.rows {
            version.left |= slots.contains(&version.slot) && !version.pending && Some(*row) != but;
        }
        self.memory.rows.retain(|_, version| !version.left || version.readers > 0);
    }
}

fn below(n: usize) -> usize {
    thread_rng().gen_range(0..n)
}

/// Loads or, with an id, replaces. Storing happens between two locks, as it takes long.
fn store(world: &Mutex<World>, old: Option<AdapterId>, bytes: usize) -> Option<AdapterId> {
    let ticket = {
        let mut world = world.lock().unwrap();
        let admitted = match old {
            None => world.policy.admit(1, bytes),
            Some(id) => match world.policy.replacing(id) {
                Ok(false) => world.policy.admit_replacement(id, bytes),
                _ => return None,
            },
        };
        let (ticket, victims) = admitted.ok()?;
        world.leave(&victims, None);
        if !ticket.in_place() {
            world.write(ticket.row(), ticket.id().slot, bytes);
        }
        ticket
    };
    thread::yield_now();
    let mut world = world.lock().unwrap();
    if below(4) == 0 || world.policy.check(&ticket).is_err() {
        world.policy.cancel(&ticket);
        if !ticket.in_place() {
            assert!(world.memory.rows.remove(&ticket.row()).is_some());
        }
        return None;
    }
    if ticket.in_place() {
        let before = world.memory.rows.remove(&ticket.row());
        assert!(before.is_some_and(|version| version.readers == 0), "a version in use was overwritten");
        world.write(ticket.row(), ticket.id().slot, bytes);
    }
    let id = world.policy.commit(&ticket).unwrap();
    world.memory.rows.get_mut(&ticket.row()).expect("it was written").pending = false;
    world.leave(&[id.slot], Some(ticket.row()));
    Some(id)
}

/// Reads what it leased, for a while.
fn batch(world: &Mutex<World>, id: AdapterId) {
    let hold = {
        let mut world = world.lock().unwrap();
        let Ok(holds) = world.policy.lease(&[Some(id)]) else { return };
        let version = world.memory.rows.get_mut(&holds[0].row).expect("what is leased lies in memory");
        assert!(!version.left && !version.pending && version.slot == id.slot);
        version.readers += 1;
        holds[0]
    };
    thread::yield_now();
    let mut world = world.lock().unwrap();
    let version = world.memory.rows.get_mut(&hold.row).expect("what is leased stays in memory");
    assert_eq!(version.slot, id.slot, "what is leased stays what it is");
    version.readers -= 1;
    world.leave(&[], None);
    world.policy.release(hold);
}

fn worker(world: &Mutex<World>, ids: &Mutex<Vec<AdapterId>>) {
    for _ in 0..6 {
        let known = ids.lock().unwrap().clone();
        let pick = (!known.is_empty()).then(|| known[below(known.len())]);
        let bytes = 20 + below(60);
        match (below(6), pick) {
            (0 | 1, _) | (_, None) => {
                let id = store(world, None, bytes);
                ids.lock().unwrap().extend(id);
            }
            (2, Some(id)) => drop(store(world, Some(id), bytes)),
            (3, Some(id)) => {
                let mut world = world.lock().unwrap();
                if world.policy.unload(id).is_ok() {
                    world.leave(&[id.slot], None);
                }
            }
            (_, Some(id)) => batch(world, id),
        }
    }
}

#[test]
fn no_order_of_calls_breaks_an_account_or_a_version_in_use() {
    let run = || {
        let policy = Policy::new(BUDGET, 8, ROWS, Eviction::LeastRecent);
        let world = Arc::new(Mutex::new(World { policy, memory: Memory::default() }));
        let ids = Arc::new(Mutex::new(Vec::new()));
        let workers: Vec<_> = (0..3)
            .map(|_| {
                let (world, ids) = (Arc::clone(&world), Arc::clone(&ids));
                thread::spawn(move || worker(&world, &ids))
            })
            .collect();
        workers.into_iter().for_each(|worker| worker.join().unwrap());
        let world = world.lock().unwrap();
        let (used, held) =
            (world.policy.used(), world.memory.rows.values().map(|version| version.bytes).sum::<usize>());
        assert_eq!((used, world.policy.draining(), world.policy.loading()), (held, 0, 0));
    };
    shuttle::check_random(run, 3000);
    shuttle::check_pct(run, 1000, 3);
}
