//! Every way in which a safetensors file can lie, one line each.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on may panic")]

use moe_lora_files::{SafetensorsFile, contained_path, read_json, write_whole};
use std::path::Path;

fn file(header: &str, data: usize) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(header.as_bytes());
    bytes.resize(bytes.len() + data, 7);
    bytes
}

fn refusal(header: &str, data: usize) -> String {
    SafetensorsFile::from_bytes("f", file(header, data)).unwrap_err().to_string()
}

#[test]
fn a_good_file_is_read_mapped_or_not() {
    let header = r#"{"b":{"dtype":"F32","shape":[2],"data_offsets":[4,12]},"__metadata__":{"format":"pt"},
                     "a":{"dtype":"BF16","shape":[1,2],"data_offsets":[0,4]}}"#;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.safetensors");
    std::fs::write(&path, file(header, 12)).unwrap();
    let opened = SafetensorsFile::open(&path).unwrap();
    assert_eq!(opened.tensors().iter().map(|t| &*t.name).collect::<Vec<_>>(), ["a", "b"]);
    let b = opened.get("b").unwrap().clone();
    assert_eq!(opened.read(&b).unwrap(), [7; 8]);
    assert!(opened.buffer(&b).is_none());
    let mapped = opened.map().unwrap();
    let (buffer, offset) = mapped.buffer(&b).unwrap();
    assert_eq!(&buffer.bytes()[offset..offset + 8], [7; 8]);
    assert_eq!(mapped.read(&b).unwrap(), [7; 8]);
    assert!(mapped.get("c").is_none());
}

#[test]
fn lies_in_the_header_are_named() {
    let one = |body: &str| format!("{{\"w\":{{{body}}}}}");
    let ok = r#""dtype":"F32","shape":[2],"data_offsets":[0,8]"#;
    assert!(SafetensorsFile::from_bytes("f", file(&one(ok), 8)).is_ok());
    assert!(refusal(&one(ok), 4).contains("4 bytes of data"), "truncated");
    assert!(refusal(&one(ok), 12).contains("12 bytes of data"), "trailing bytes");
    assert!(refusal(&one(r#""dtype":"F32","shape":[3],"data_offsets":[0,8]"#), 8).contains("w: found bytes 0..8"));
    assert!(refusal(&one(r#""dtype":"F32","shape":[2],"data_offsets":[8,0]"#), 8).contains("bytes 8..0"));
    assert!(refusal(&one(r#""dtype":"F32","shape":[2],"data_offsets":[4,12]"#), 12).contains("from byte 4"), "gap");
    let huge = r#""dtype":"F64","shape":[4294967295,4294967295,4294967295],"data_offsets":[0,8]"#;
    assert!(refusal(&one(huge), 8).contains("the size of"), "overflow");
    assert!(refusal(&one(r#""dtype":"F31","shape":[2],"data_offsets":[0,8]"#), 8).contains("unknown variant"));
    assert!(refusal(&one(r#""dtype":"F32","shape":[1,1,1,1,1,1,1,1,2],"data_offsets":[0,8]"#), 8).contains("8 dimen"));
    assert!(refusal(&one(r#""dtype":"F32","shape":[-2],"data_offsets":[0,8]"#), 8).contains("header"));
    let twice = format!(r#"{{"w":{{{ok}}},"w":{{"dtype":"F32","shape":[1],"data_offsets":[8,12]}}}}"#);
    assert!(refusal(&twice, 12).contains("w: found the name twice"));
    let overlap = format!(r#"{{"v":{{{ok}}},"w":{{{ok}}}}}"#);
    assert!(refusal(&overlap, 8).contains("from byte 0"));
    assert!(refusal("[]", 0).contains("header"));
    assert!(refusal("{} {}", 0).contains("header"));
}

#[test]
fn lies_about_the_header_size_are_named() {
    let open = |bytes: Vec<u8>| SafetensorsFile::from_bytes("f", bytes).unwrap_err().to_string();
    assert!(open(vec![]).contains("0 bytes"));
    assert!(open(u64::MAX.to_le_bytes().to_vec()).contains("a header of 18446744073709551615 bytes"));
    assert!(open(9_u64.to_le_bytes().to_vec()).contains("a header of 9 bytes in a file of 8"));
}

#[test]
fn paths_stay_inside_the_folder() {
    let folder = Path::new("/models/x");
    assert_eq!(contained_path(folder, "a/b.safetensors").unwrap(), folder.join("a/b.safetensors"));
    for bad in ["", "..", "../x", "a/../../x", "/etc/passwd", "./x", "a\\b", "a\0b"] {
        assert!(contained_path(folder, bad).is_err(), "{bad:?}");
    }
}

#[test]
fn a_failed_write_leaves_the_old_file() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("out.json");
    write_whole(&path, |f| std::io::Write::write_all(f, b"[1]")).unwrap();
    write_whole(&path, |_| Err(std::io::Error::other("disk full"))).unwrap_err();
    assert_eq!(read_json::<Vec<u32>>(&path).unwrap(), [1]);
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1, "nothing is left beside it");
    assert!(read_json::<Vec<u32>>(folder.path().join("none")).unwrap_err().file.is_some());
}
