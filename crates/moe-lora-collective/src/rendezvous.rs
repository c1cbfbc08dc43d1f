//! Where ranks of different processes meet: rank 0 tells the others the id of the group, through a file or over TCP.
//!
//! Neither way proves who is there. Use a folder and a network that only the ranks can reach.

use crate::CollectiveError;
use std::fs::File;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::time::{Duration, Instant};

/// Bytes of an id, NCCL's.
pub const ID_BYTES: usize = 128;

const POLL: Duration = Duration::from_millis(5);
/// Opens what a rank sends, so that a stray connection is told from one.
const GREETING: &[u8; 8] = b"moe-lora";

/// Rank 0 writes `id` to `path`, which appears whole; the others wait for it. `path` must be new for every start: rank 0
/// refuses a file that is there, and should remove it when all have joined.
///
/// # Errors
/// If the file is there already or cannot be written, or is not there within `patience`.
pub fn by_file(path: &Path, id: Option<[u8; ID_BYTES]>, patience: Duration) -> Result<[u8; ID_BYTES], CollectiveError> {
    let failed =
        |e: io::Error| CollectiveError::Rendezvous { place: path.display().to_string(), reason: e.to_string() };
    if let Some(id) = id {
        let mut name = path.as_os_str().to_owned();
        name.push(format!(".{}", std::process::id()));
        let beside = Path::new(&name);
        File::create_new(beside).and_then(|mut file| file.write_all(&id)).map_err(failed)?;
        // A link, unlike a rename, does not replace what is there.
        let linked = std::fs::hard_link(beside, path);
        std::fs::remove_file(beside).map_err(failed)?;
        return match linked {
            Ok(()) => Ok(id),
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
                Err(CollectiveError::StaleRendezvous { path: path.to_owned() })
            }
            Err(e) => Err(failed(e)),
        };
    }
    let start = Instant::now();
    loop {
        match File::open(path) {
            Ok(mut file) => {
                let mut id = [0; ID_BYTES];
                file.read_exact(&mut id).map_err(failed)?;
                return Ok(id);
            }
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(failed(e)),
            Err(_) if start.elapsed() > patience => return Err(late(path.display(), patience)),
            Err(_) => std::thread::sleep(POLL),
        }
    }
}

/// Rank 0 listens at `address` and tells `id` to every other rank of `size`; the others connect there.
///
/// # Errors
/// If the address cannot be used, two processes say that they are the same rank, or not all are there within `patience`.
pub fn by_tcp(
    address: SocketAddr,
    rank: usize,
    size: usize,
    id: Option<[u8; ID_BYTES]>,
    patience: Duration,
) -> Result<[u8; ID_BYTES], CollectiveError> {
    let failed = |e: io::Error| CollectiveError::Rendezvous { place: address.to_string(), reason: e.to_string() };
    let Some(id) = id else { return ask(address, rank, size, patience) };
    let listener = TcpListener::bind(address).map_err(failed)?;
    listener.set_nonblocking(true).map_err(failed)?;
    let start = Instant::now();
    let mut told: Vec<bool> = (0..size).map(|r| r == rank).collect();
    while told.contains(&false) {
        match listener.accept() {
            Ok((stream, _)) => {
                // Whoever says anything else is no rank.
                let Ok(Some(other)) = greeted(&stream, size, patience) else { continue };
                if std::mem::replace(&mut told[other], true) {
                    let reason = format!("two processes say that they are rank {other}");
                    return Err(CollectiveError::Rendezvous { place: address.to_string(), reason });
                }
                (&stream).write_all(&id).map_err(failed)?;
            }
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                if start.elapsed() > patience {
                    return Err(late(address, patience));
                }
                std::thread::sleep(POLL);
            }
            Err(e) => return Err(failed(e)),
        }
    }
    Ok(id)
}

fn ask(address: SocketAddr, rank: usize, size: usize, patience: Duration) -> Result<[u8; ID_BYTES], CollectiveError> {
    let start = Instant::now();
    loop {
        let left = patience.saturating_sub(start.elapsed()).max(POLL);
        let answer = TcpStream::connect_timeout(&address, left).and_then(|mut stream| {
            stream.set_read_timeout(Some(left))?;
            let numbers = [rank as u64, size as u64].map(u64::to_le_bytes).concat();
            stream.write_all(&[GREETING, &numbers[..]].concat())?;
            let mut id = [0; ID_BYTES];
            stream.read_exact(&mut id).map(|()| id)
        });
        match answer {
            Ok(id) => return Ok(id),
            // Rank 0 may not be listening yet.
            Err(_) if start.elapsed() < patience => std::thread::sleep(POLL),
            Err(_) => return Err(late(address, patience)),
        }
    }
}

/// The rank at the other end of a connection; `None` if it is one of another group.
fn greeted(stream: &TcpStream, size: usize, patience: Duration) -> io::Result<Option<usize>> {
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(patience.min(Duration::from_secs(1)).max(POLL)))?;
    let mut words = [[0_u8; 8]; 3];
    for word in &mut words {
        (&*stream).read_exact(word)?;
    }
    let [greeting, rank, theirs] = words;
    let rank = usize::try_from(u64::from_le_bytes(rank)).ok().filter(|&rank| rank < size);
    Ok(rank.filter(|_| greeting == *GREETING && u64::from_le_bytes(theirs) == size as u64))
}

fn late(place: impl ToString, after: Duration) -> CollectiveError {
    CollectiveError::TimedOut { what: format!("meeting at {}", place.to_string()), after }
}
