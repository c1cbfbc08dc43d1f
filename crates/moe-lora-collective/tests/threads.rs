//! Groups of threads: sums, the same bits everywhere, and what becomes of a rank that fails, dies, aborts or hangs.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test that cannot go on may panic")]

use moe_lora_collective::{CollectiveError, Communicator, Single, ThreadCommunicator};
use std::sync::mpsc;
use std::time::Duration;

/// Runs `work` on every rank of a group and returns what each one says; a hang is a failure after ten seconds.
fn run<T: Send + 'static>(
    ranks: Vec<ThreadCommunicator>,
    work: impl Fn(ThreadCommunicator) -> T + Send + Clone + 'static,
) -> Vec<Option<T>> {
    let (sender, receiver) = mpsc::channel();
    let size = ranks.len();
    for (rank, communicator) in ranks.into_iter().enumerate() {
        let (sender, work) = (sender.clone(), work.clone());
        std::thread::spawn(move || {
            let done = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| work(communicator)));
            sender.send((rank, done.ok())).unwrap();
        });
    }
    let mut all: Vec<Option<T>> = (0..size).map(|_| None).collect();
    for _ in 0..size {
        let (rank, done) = receiver.recv_timeout(Duration::from_secs(10)).expect("no rank hangs");
        all[rank] = done;
    }
    all
}

#[test]
fn sums_have_the_same_bits_on_every_rank() {
    for size in [1, 2, 3, 8] {
        let sums = run(ThreadCommunicator::group(size), move |c| {
            let mut all = Vec::new();
            for round in 0..50_usize {
                let mut values: Vec<f32> =
                    (0..round).map(|n| ((n + 1) as f32).sin() * 10_f32.powi(c.rank() as i32)).collect();
                c.all_reduce(&mut values).unwrap();
                all.extend(values.iter().map(|v| v.to_bits()));
            }
            all
        });
        assert!(sums.windows(2).all(|w| w[0] == w[1]), "{size} ranks");
        let last = f32::from_bits(*sums[0].as_ref().unwrap().last().unwrap());
        let want: f32 = (0..size).map(|r| 49_f32.sin() * 10_f32.powi(r as i32)).sum();
        assert_eq!(last, want);
    }
    let mut alone = [1.5];
    Single.all_reduce(&mut alone).unwrap();
    assert_eq!((alone, Single.size()), ([1.5], 1));
}

#[test]
fn a_rank_that_fails_is_an_error_for_all_and_the_group_goes_on() {
    let results = run(ThreadCommunicator::group(4), |c| {
        let mut all = Vec::new();
        for round in 0..20 {
            if c.rank() == round % 4 && round % 3 == 0 {
                c.fail("no such adapter");
                all.push(None);
            } else {
                all.push(Some(c.all_reduce(&mut [1.0])));
            }
        }
        all
    });
    for round in 0..20 {
        for (rank, results) in results.iter().enumerate() {
            let failed = (round % 3 == 0).then_some(round % 4);
            match (&results.as_ref().unwrap()[round], failed) {
                (None, Some(failed)) => assert_eq!(rank, failed),
                (Some(Err(CollectiveError::PeerFailed { rank, reason })), Some(failed)) => {
                    assert_eq!((*rank, reason.as_str()), (failed, "no such adapter"));
                }
                (Some(Ok(())), None) => {}
                (other, _) => panic!("round {round}, rank {rank}: {other:?}"),
            }
        }
    }
}

#[test]
fn ranks_that_all_fail_stay_in_step() {
    let results = run(ThreadCommunicator::group(3), |c| {
        (0..100).for_each(|_| c.fail("bad input"));
        let mut values = [2.0];
        c.all_reduce(&mut values).map(|()| values[0])
    });
    assert!(results.into_iter().all(|r| r == Some(Ok(6.0))));
}

#[test]
fn a_thread_that_dies_is_an_error_for_all() {
    let results = run(ThreadCommunicator::group(4), |c| {
        let mut values = [1.0];
        c.all_reduce(&mut values).unwrap();
        assert!(c.rank() != 2, "on purpose");
        // Twice, as a group that has lost a rank stays lost.
        (c.all_reduce(&mut values), c.all_reduce(&mut values))
    });
    for (rank, result) in results.into_iter().enumerate() {
        let gone = Err(CollectiveError::PeerGone { rank: 2 });
        assert_eq!(result, (rank != 2).then(|| (gone.clone(), gone)));
    }
}

#[test]
fn a_rank_that_leaves_after_its_last_collective_hurts_nobody() {
    for _ in 0..200 {
        let results = run(ThreadCommunicator::group(3), |c| c.all_reduce(&mut [1.0]));
        assert!(results.into_iter().all(|r| r == Some(Ok(()))));
    }
}

#[test]
fn an_abort_reaches_those_who_wait_and_those_who_come_later() {
    let results = run(ThreadCommunicator::group(3), |c| {
        match c.rank() {
            0 => c.abort("the operator said so"),
            1 => std::thread::sleep(Duration::from_millis(50)),
            _ => {}
        }
        c.all_reduce(&mut [1.0]).unwrap_err().to_string()
    });
    let text = "the group of ranks was ended: the operator said so";
    assert!(results.iter().all(|r| r.as_deref() == Some(text)), "{results:?}");
}

#[test]
fn a_rank_that_hangs_is_given_up() {
    let patience = Duration::from_millis(100);
    let results = run(ThreadCommunicator::group_with_patience(3, patience), move |c| {
        if c.rank() == 1 {
            std::thread::sleep(4 * patience);
        }
        c.all_reduce(&mut [1.0])
    });
    let late = CollectiveError::TimedOut { what: "an all-reduce".into(), after: patience };
    assert!(results.into_iter().all(|r| r == Some(Err(late.clone()))));
}

#[test]
fn ranks_that_bring_different_numbers_of_values_are_told() {
    let results = run(ThreadCommunicator::group(2), |c| c.all_reduce(&mut vec![1.0; 3 + c.rank()]));
    let mismatch = CollectiveError::Mismatch { rank: 1, found: 4, expected: 3 };
    assert!(results.into_iter().all(|r| r == Some(Err(mismatch.clone()))));
}
