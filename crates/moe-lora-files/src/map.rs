//! The one place that maps files.

use memmap2::Mmap;
use std::fs::File;
use std::io;

/// Maps a whole file for reading.
pub(crate) fn map(file: &File) -> io::Result<Mmap> {
    // SAFETY: the map is read-only and private to this process's view. The one hazard left is another process that
    // shortens the file while it is mapped (SIGBUS); model checkpoints are written once, `SafetensorsFile::map` states the
    // condition, and adapters, which are rewritten in training loops, are read and never mapped.
    unsafe { Mmap::map(file) }
}
