//! Ranks of different processes meet, here as threads: in any order, and not with strangers.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on may panic")]

use moe_lora_collective::CollectiveError;
use moe_lora_collective::rendezvous::{ID_BYTES, by_file, by_tcp};
use std::io::Write;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

const PATIENCE: Duration = Duration::from_secs(10);
const SHORT: Duration = Duration::from_millis(60);

fn id() -> [u8; ID_BYTES] {
    std::array::from_fn(|n| n as u8)
}

fn free_address() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
}

#[test]
fn a_file_tells_the_id_and_must_be_new() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("group");
    std::thread::scope(|scope| {
        let waiting: Vec<_> = (0..3).map(|_| scope.spawn(|| by_file(&path, None, PATIENCE))).collect();
        std::thread::sleep(SHORT);
        assert_eq!(by_file(&path, Some(id()), PATIENCE), Ok(id()));
        assert!(waiting.into_iter().all(|t| t.join().unwrap() == Ok(id())));
    });
    assert_eq!(by_file(&path, Some(id()), PATIENCE), Err(CollectiveError::StaleRendezvous { path: path.clone() }));
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1, "nothing is left beside it");
    std::fs::remove_file(&path).unwrap();
    assert!(matches!(by_file(&path, None, SHORT), Err(CollectiveError::TimedOut { .. })));
    std::fs::write(&path, "short").unwrap();
    assert!(matches!(by_file(&path, None, SHORT), Err(CollectiveError::Rendezvous { .. })));
}

#[test]
fn tcp_tells_the_id_to_ranks_only() {
    let address = free_address();
    std::thread::scope(|scope| {
        let early = scope.spawn(move || by_tcp(address, 2, 3, None, PATIENCE));
        std::thread::sleep(SHORT);
        let server = scope.spawn(move || by_tcp(address, 0, 3, Some(id()), PATIENCE));
        std::thread::sleep(SHORT);
        // A stranger, one that says nothing, and one of another group.
        TcpStream::connect(address).unwrap().write_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
        drop(TcpStream::connect(address).unwrap());
        assert!(matches!(by_tcp(address, 1, 4, None, SHORT), Err(CollectiveError::TimedOut { .. })));
        assert_eq!(by_tcp(address, 1, 3, None, PATIENCE), Ok(id()));
        assert_eq!((early.join().unwrap(), server.join().unwrap()), (Ok(id()), Ok(id())));
    });
}

#[test]
fn a_missing_rank_is_an_error_in_time() {
    let address = free_address();
    assert!(matches!(by_tcp(address, 0, 2, Some(id()), SHORT), Err(CollectiveError::TimedOut { .. })));
    assert!(matches!(by_tcp(address, 1, 2, None, SHORT), Err(CollectiveError::TimedOut { .. })));
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap();
    assert!(matches!(by_tcp(address, 0, 2, Some(id()), SHORT), Err(CollectiveError::Rendezvous { .. })));
}
