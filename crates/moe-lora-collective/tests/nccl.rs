//! NCCL on a GPU: a group of one in a captured graph, and groups that cannot come together. Without a GPU or NCCL's library the
//! reason is what is tested.
#![cfg(feature = "cuda")]
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stderr,
    reason = "a test that cannot go on may panic and speak"
)]

use moe_lora_collective::{CollectiveError, Communicator, GpuCommunicator, NcclCommunicator};
use moe_lora_cuda::{Gpu, NcclError, NcclId, nccl_version, testing};
use std::time::{Duration, Instant};

const PATIENCE: Duration = Duration::from_secs(20);

/// GPU 0 and an id; `None` after a loud word where there is no GPU or, unless one was promised, no NCCL.
fn start(test: &str) -> Option<(Gpu, NcclId)> {
    let gpu = testing::gpu(test)?;
    match NcclId::new() {
        Ok(id) => Some((gpu, id)),
        Err(why @ NcclError::NotFound { .. }) => {
            assert!(std::env::var_os("MOE_LORA_NCCL").is_none(), "{test}: {why}");
            eprintln!("SKIPPED {test}: {why}");
            None
        }
        Err(why) => panic!("{test}: {why}"),
    }
}

#[test]
fn a_group_of_one_runs_in_a_captured_graph() {
    let Some((gpu, id)) = start("NCCL in a graph") else { return };
    let alone = NcclCommunicator::join(&gpu, 0, 1, id, PATIENCE).unwrap();
    let (stream, count) = (gpu.stream().unwrap(), 1_000_003);
    let buffer = gpu.alloc(4 * count + 256).unwrap();
    let graph = stream.capture(|| {
        stream.fill(&buffer, 0, 256, 0)?;
        alone.all_reduce_on(&stream, &buffer, 256, count).unwrap();
        stream.fill(&buffer, 0, 128, 7)
    });
    let graph = graph.unwrap();
    for round in 0..10 {
        let values: Vec<f32> = (0..count).map(|n| ((n + round) as f32).sin()).collect();
        stream.upload(&buffer, 256, &values).unwrap();
        graph.launch().unwrap();
        alone.wait(&stream).unwrap();
        let (mut found, mut ends) = (vec![f32::NAN; count], [1_u8; 256]);
        stream.download(&buffer, 256, &mut found).unwrap();
        stream.download(&buffer, 0, &mut ends).unwrap();
        assert!(found == values && ends[..128] == [7; 128] && ends[128..] == [0; 128], "round {round}");
    }
    let start = Instant::now();
    for _ in 0..200 {
        graph.launch().unwrap();
    }
    alone.wait(&stream).unwrap();
    let version = nccl_version().unwrap();
    eprintln!("NCCL {version}, one rank, graph of 2 fills and 4 MB: {:.1} us", start.elapsed().as_secs_f64() * 5e3);

    // In the host's memory too, and past its end it says so.
    let mut values = vec![0.5_f32; 999];
    alone.all_reduce(&mut values).unwrap();
    assert_eq!(values, [0.5; 999]);
    let beyond = alone.all_reduce_on(&stream, &buffer, 512, count).unwrap_err();
    assert!(matches!(beyond, CollectiveError::Nccl(NcclError::Gpu(_))), "{beyond}");
    drop(graph);
    alone.abort("the test says so");
    assert_eq!(alone.all_reduce(&mut values), Err(CollectiveError::Nccl(NcclError::Aborted)));
    assert_eq!(alone.all_reduce_on(&stream, &buffer, 0, 1), Err(CollectiveError::Nccl(NcclError::Aborted)));
}

#[test]
fn ranks_meet_at_a_file_or_an_address() {
    let Some((gpu, _)) = start("NCCL rendezvous") else { return };
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("group");
    let mut values = [2.0];
    NcclCommunicator::join_by_file(&gpu, 0, 1, &path, PATIENCE).unwrap().all_reduce(&mut values).unwrap();
    assert!(!path.exists(), "the file is gone when all have joined");
    let address = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    NcclCommunicator::join_by_tcp(&gpu, 0, 1, address, PATIENCE).unwrap().all_reduce(&mut values).unwrap();
    assert_eq!(values, [2.0]);
}

#[test]
fn groups_that_cannot_come_together_are_errors_in_time() {
    let Some((gpu, id)) = start("NCCL groups that fail") else { return };
    let start = Instant::now();
    let alone = NcclCommunicator::join(&gpu, 1, 2, id, Duration::from_secs(2)).unwrap_err();
    assert!(matches!(alone, CollectiveError::Nccl(NcclError::TimedOut { .. } | NcclError::Failed { .. })), "{alone}");
    assert!(start.elapsed() < Duration::from_secs(10), "{:?}", start.elapsed());
    let error = NcclCommunicator::join(&gpu, 2, 2, id, PATIENCE).unwrap_err().to_string();
    assert_eq!(error, "rank 2 of 2, expected a rank below it");

    // Two ranks on one GPU, which NCCL refuses.
    let id = NcclId::new().unwrap();
    let both = std::thread::scope(|scope| {
        let ranks: Vec<_> = (0..2)
            .map(|rank| {
                let gpu = &gpu;
                scope.spawn(move || NcclCommunicator::join(gpu, rank, 2, id, Duration::from_secs(5)).map(drop))
            })
            .collect();
        ranks.into_iter().map(|r| r.join().unwrap()).collect::<Vec<_>>()
    });
    for error in both {
        let error = error.unwrap_err();
        eprintln!("two ranks on one GPU: {error}");
        assert!(matches!(error, CollectiveError::Nccl(_)), "{error}");
    }
}
