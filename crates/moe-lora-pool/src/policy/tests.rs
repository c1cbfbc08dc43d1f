//! The policy alone: no weights, no threads.

use super::*;

fn load(policy: &mut Policy, bytes: usize) -> Result<AdapterId, PoolError> {
    let (ticket, _) = policy.admit(0, bytes)?;
    policy.commit(&ticket)
}

fn loaded(policy: &Policy) -> Vec<AdapterId> {
    policy.tenants().map(|(id, _)| id).collect()
}

fn id(slot: u32, generation: u32) -> AdapterId {
    AdapterId { slot, generation }
}

#[test]
fn the_least_recently_used_go_and_only_as_many_as_needed() {
    let mut policy = Policy::new(100, 10, usize::MAX, Eviction::LeastRecent);
    let [a, b, c] = [30, 30, 30].map(|bytes| load(&mut policy, bytes).unwrap());
    let hold = policy.lease(&[Some(a), None, Some(a)]).unwrap();
    assert_eq!(hold.len(), 1, "one hold for an adapter however many tokens use it");
    policy.release(hold[0]);
    let (ticket, victims) = policy.admit(0, 50).unwrap();
    assert_eq!(victims, [b.slot, c.slot], "10 + 30 + 30 >= 50 and a was used last");
    assert_eq!((policy.used(), policy.loading()), (80, 50));
    let d = policy.commit(&ticket).unwrap();
    assert_eq!(loaded(&policy), [a, d]);
    assert_eq!(d, id(b.slot, 1), "the lowest free slot, next generation");
}

#[test]
fn pinned_and_leased_adapters_stay_and_the_error_says_what_holds_the_bytes() {
    let mut policy = Policy::new(100, 10, usize::MAX, Eviction::LeastRecent);
    let [a, b, c] = [40, 30, 20].map(|bytes| load(&mut policy, bytes).unwrap());
    policy.pin(a, true).unwrap();
    let hold = policy.lease(&[Some(b)]).unwrap()[0];
    let error = policy.admit(0, 40).unwrap_err();
    let (budget, free) = (100, 10);
    let held = PoolError::NoRoom { needed: 40, budget, free, evictable: 20, pinned: 40, in_use: 30, loading: 0 };
    assert_eq!(error, held);
    assert_eq!(loaded(&policy), [a, b, c], "a failed load evicts nobody");
    policy.release(hold);
    policy.pin(a, false).unwrap();
    assert_eq!(policy.admit(0, 100).unwrap().1, [a.slot, c.slot, b.slot], "the lease was a use of b");
}

#[test]
fn loads_side_by_side_cannot_overshoot() {
    let mut policy = Policy::new(100, 2, usize::MAX, Eviction::LeastRecent);
    let (first, _) = policy.admit(0, 60).unwrap();
    assert!(matches!(policy.admit(0, 60), Err(PoolError::NoRoom { free: 40, loading: 60, .. })));
    let (second, _) = policy.admit(0, 40).unwrap();
    assert_eq!(policy.admit(0, 0).unwrap_err(), PoolError::NoSlot { max_adapters: 2 }, "tickets hold slots too");
    policy.cancel(&first);
    assert_eq!(policy.used(), 40);
    assert_eq!(policy.commit(&second).unwrap(), id(1, 0));
    assert_eq!(load(&mut policy, 60).unwrap(), id(0, 0), "nobody saw the cancelled id");
    assert_eq!(policy.used(), 100);
}

#[test]
fn one_adapter_more_than_slots_evicts_one() {
    let mut policy = Policy::new(100, 2, usize::MAX, Eviction::LeastRecent);
    let [a, b, c] = [1, 1, 1].map(|bytes| load(&mut policy, bytes).unwrap());
    assert_eq!(loaded(&policy), [c, b]);
    assert_eq!(policy.unload(a), Err(PoolError::Stale { id: a }));
}

#[test]
fn bytes_of_an_unloaded_version_are_free_when_its_last_lease_drops() {
    let mut policy = Policy::new(100, 10, usize::MAX, Eviction::LeastRecent);
    let a = load(&mut policy, 60).unwrap();
    let holds = [0; 2].map(|_| policy.lease(&[Some(a)]).unwrap()[0]);
    policy.unload(a).unwrap();
    assert_eq!(policy.lease(&[Some(a)]), Err(PoolError::Stale { id: a }));
    let b = load(&mut policy, 40).unwrap();
    assert_eq!(b.slot, a.slot, "the slot is free at once");
    policy.release(holds[0]);
    assert_eq!((policy.draining(), policy.used()), (60, 100));
    policy.release(holds[1]);
    assert_eq!((policy.draining(), policy.used()), (0, 40));
    assert_eq!(policy.tenants().map(|(_, t)| t.stored.leases).sum::<usize>(), 0, "the next tenant is untouched");
}

#[test]
fn a_replacement_evicts_others_before_it_counts_on_the_old_bytes() {
    let mut policy = Policy::new(100, 10, usize::MAX, Eviction::LeastRecent);
    let [a, b] = [50, 30].map(|bytes| load(&mut policy, bytes).unwrap());
    let (ticket, victims) = policy.admit_replacement(a, 50).unwrap();
    assert_eq!((victims, policy.used()), (vec![b.slot], 100));
    assert!(policy.replacing(a).unwrap());
    let blocked = policy.admit(0, 10).unwrap_err();
    assert!(matches!(blocked, PoolError::NoRoom { .. }), "an adapter is not evicted while it is replaced");
    policy.commit(&ticket).unwrap();
    assert_eq!((policy.used(), policy.replacing(a).unwrap()), (50, false));

    let (ticket, victims) = policy.admit_replacement(a, 70).unwrap();
    assert_eq!((victims, policy.used()), (vec![], 70), "50 stay, 20 more are set aside");
    policy.commit(&ticket).unwrap();
    assert_eq!(policy.used(), 70);
}

#[test]
fn a_replacement_that_counts_on_the_old_bytes_fails_if_they_are_leased_meanwhile() {
    let mut policy = Policy::new(100, 10, usize::MAX, Eviction::LeastRecent);
    let a = load(&mut policy, 60).unwrap();
    let (ticket, _) = policy.admit_replacement(a, 80).unwrap();
    let hold = policy.lease(&[Some(a)]).unwrap()[0];
    assert!(matches!(policy.commit(&ticket), Err(PoolError::NoRoom { needed: 80, .. })));
    policy.cancel(&ticket);
    assert_eq!(policy.used(), 60);
    policy.release(hold);
    let (ticket, _) = policy.admit_replacement(a, 80).unwrap();
    policy.commit(&ticket).unwrap();
    assert_eq!(policy.used(), 80, "and works once they are not");
}

#[test]
fn a_replacement_of_an_adapter_unloaded_meanwhile_is_refused() {
    let mut policy = Policy::new(100, 10, usize::MAX, Eviction::LeastRecent);
    let a = load(&mut policy, 60).unwrap();
    let (ticket, _) = policy.admit_replacement(a, 80).unwrap();
    policy.unload(a).unwrap();
    let b = load(&mut policy, 80).unwrap();
    assert_eq!(b.slot, a.slot);
    assert_eq!(policy.commit(&ticket), Err(PoolError::Stale { id: a }));
    policy.cancel(&ticket);
    assert_eq!((loaded(&policy), policy.used()), (vec![b], 80));
}

#[test]
fn forged_and_former_ids_are_stale_and_hold_nothing() {
    let mut policy = Policy::new(100, 10, usize::MAX, Eviction::LeastRecent);
    let a = load(&mut policy, 10).unwrap();
    let (_ticket, _) = policy.admit(0, 10).unwrap();
    for forged in [id(0, 1), id(1, 0), id(2, 0), id(u32::MAX, u32::MAX), id(i32::MAX.unsigned_abs(), 0)] {
        let stale = PoolError::Stale { id: forged };
        assert_eq!(policy.lease(&[Some(a), None, Some(forged)]).unwrap_err(), stale);
        assert_eq!(policy.unload(forged).unwrap_err(), stale);
        assert_eq!(policy.pin(forged, true).unwrap_err(), stale);
        assert_eq!(policy.admit_replacement(forged, 1).unwrap_err(), stale);
    }
    assert!(policy.tenants().all(|(_, t)| t.stored.leases == 0 && !t.pinned));
}

#[test]
fn a_slot_out_of_generations_is_never_used_again() {
    let mut policy = Policy::new(100, 1, usize::MAX, Eviction::LeastRecent);
    let first = load(&mut policy, 10).unwrap();
    policy.unload(first).unwrap();
    policy.slots[0].generation = u32::MAX;
    let last = load(&mut policy, 10).unwrap();
    assert_eq!(last, id(0, u32::MAX));
    let next = load(&mut policy, 10).unwrap(); // evicts `last`
    assert_eq!(next, id(1, 0), "the worn slot does not count against max_adapters");
    assert_eq!(policy.lease(&[Some(last)]), Err(PoolError::Stale { id: last }));
    policy.unload(next).unwrap();
    assert_eq!(load(&mut policy, 10).unwrap(), id(1, 1));
}

#[test]
fn where_frequency_counts_the_seldom_used_go_first_and_come_back_with_their_counts() {
    let mut policy = Policy::new(2, 10, usize::MAX, Eviction::LeastFrequent);
    let load = |policy: &mut Policy, who| {
        let (ticket, _) = policy.admit(who, 1).unwrap();
        policy.commit(&ticket).unwrap()
    };
    let using = |policy: &mut Policy, id, times| {
        for _ in 0..times {
            let hold = policy.lease(&[Some(id)]).unwrap()[0];
            policy.release(hold);
        }
    };
    let often = load(&mut policy, 1);
    using(&mut policy, often, 20);
    let seldom = load(&mut policy, 2);
    using(&mut policy, seldom, 3);
    let new = load(&mut policy, 3);
    assert_eq!(loaded(&policy), [often, new], "the last one to be used, and not often");
    using(&mut policy, new, 2);
    let again = load(&mut policy, 2);
    using(&mut policy, again, 1);
    load(&mut policy, 3);
    assert_eq!(loaded(&policy)[0], often);
    // What was used long ago fades: 20 uses are worth less than a few new ones in the end.
    let mut last = policy.tenants().map(|(id, _)| id).nth(1).unwrap();
    for who in 4..40 {
        last = load(&mut policy, who);
        using(&mut policy, last, 40);
    }
    assert!(!loaded(&policy).contains(&often) && loaded(&policy).contains(&last));
}
